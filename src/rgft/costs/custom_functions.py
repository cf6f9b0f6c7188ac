"""Autograd functions that bring a backward of their own, such as fused losses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode


def _added_product(total: Any, left: Any, right: Any, **kwargs: Any) -> int:
    del total, kwargs
    return int(2 * left[0] * left[1] * right[1])


# The counter does not know products that are added up in place.
IN_PLACE: dict[Any, Callable[..., int]] = {torch.ops.aten.addmm_: _added_product}


@dataclass(frozen=True, slots=True)
class CustomCall:
    """A call of a custom autograd function, and what it costs.

    Attributes:
        inputs: Floating-point tensors among its arguments.
        result: What it returned, without values.
        forward: FLOPs of the forward pass.
        alone: FLOPs of the gradient of each input, beyond `joint`.
        joint: FLOPs that any gradient needs: what is computed anew for backward.
    """

    inputs: list[Tensor]
    result: Any
    forward: int
    alone: list[int]
    joint: int


@contextmanager
def custom_functions(
    note: Callable[[CustomCall], None], resting: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """In this block each call of a custom autograd function is given to `note`, as one operation.

    What its backward computes is in no operation of the forward pass; so the function is run, both
    ways, on tensors without values, in a block of `resting`. One that is given a function to run
    (reentrant checkpointing) or that cannot run without values is left alone: its forward pass is
    seen from inside.
    """
    plain, thread = Function.__dict__["apply"], threading.get_ident()

    def apply(cls: type[Function], *args: Any) -> Any:
        original = plain.__get__(None, cls)
        if threading.get_ident() != thread or any(callable(x) for x in args):
            return original(*args)
        try:
            with resting():
                call = _priced(original, args)
        except Exception:  # kernels without a version for such tensors raise whatever they like
            return original(*args)
        note(call)
        return call.result

    Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = plain  # type: ignore[method-assign]


def _priced(function: Callable[..., Any], args: tuple[Any, ...]) -> CustomCall:
    """Run a function for its result and for the FLOPs of each gradient."""
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
    inputs = [x for x in tensors if x.is_floating_point()]
    device = tensors[0].device
    everything = frozenset(map(id, inputs))
    alone = [_run(function, args, {id(tensor)})[2] for tensor in inputs]
    result, forward, together = _run(function, args, everything)
    joint = (sum(alone) - together) // (len(alone) - 1) if len(alone) > 1 else 0

    def valueless(tensor: Tensor) -> Tensor:
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )

    result = tree_map_only(Tensor, valueless, result)
    return CustomCall(inputs, result, forward, [cost - joint for cost in alone], joint)


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], wanted: Collection[int]
) -> tuple[Any, int, int]:
    """Result, FLOPs forward, and FLOPs backward where the tensors with these ids need gradients."""

    def fake(tensor: Tensor) -> Tensor:
        # on the host, whatever the device: no kernel is started, and autocast knows it
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        return empty.requires_grad_(id(tensor) in wanted)

    with FakeTensorMode(), torch.enable_grad():
        given = tree_map_only(Tensor, fake, args)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as forward:
            result = function(*given)
        roots, leaves = (
            [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor) and x.requires_grad]
            for tree in (result, given)
        )
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as backward:
            if roots:
                ones = [torch.ones_like(x) for x in roots]
                torch.autograd.grad(roots, leaves, ones, allow_unused=True)
    return result, forward.get_total_flops(), backward.get_total_flops()
