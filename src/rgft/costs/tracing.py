"""A model's forward pass, traced into a graph of operations."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from rgft.costs.custom_functions import CustomCall, custom_functions
from rgft.costs.graph import Graph, Node, Span
from rgft.costs.shapes import Operator, call, leaves

_QKV = ("query", "key", "value")


def trace(model: nn.Module, device: torch.device, args: Any, kwargs: Any) -> Graph:
    """The operations of `model(*args, **kwargs)` on `device`, run where the weights are.

    Args:
        model: A copy without values, on the meta device, or with zeros on the host.
        device: Where the real model is, which decides what kernels attention uses.
        args: Of the forward pass; only shapes and types matter.
        kwargs: The same.
    """
    where = next(model.parameters()).device
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().to(where), (args, kwargs))
    recorder, spans = _Recorder(), _Spans()
    customs = custom_functions(recorder.note_custom, recorder.resting)
    parameters = {name: recorder.index(p) for name, p in model.named_parameters()}
    fused = _FusedAttention(recorder, device)
    with spans.noting(model, recorder), torch.no_grad(), recorder, fused, customs:
        output = model(*args, **kwargs)
    outputs = frozenset(recorder.index(t) for t in _result(output))
    return Graph(tuple(recorder.nodes), parameters, outputs, spans.by_path())


def _result(output: Any) -> Iterator[Tensor]:
    """What backward starts from: the loss where the output has one, else every tensor in it."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        yield loss
        return
    yield from (x for x in tree_flatten(output)[0] if isinstance(x, Tensor))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation on floating-point values as a `Node`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self._index: dict[int, int] = {}
        self._alive: list[Tensor] = []  # keeps ids unique
        self.paused = False

    def index(self, tensor: Tensor) -> int:
        if id(tensor) not in self._index:
            self._index[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self._index[id(tensor)]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """In this block nothing is noted."""
        paused, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = paused

    def note_custom(self, call: CustomCall) -> None:
        """Note a custom autograd function as one operation."""
        outputs = (t for t in tree_flatten(call.result)[0] if _differentiable(t))
        gradients = zip(map(self.index, call.inputs), call.alone, strict=True)
        self.nodes.append(
            Node(
                tuple(self.index(t) for t in call.inputs),
                tuple(self.index(t) for t in outputs),
                call.forward,
                tuple(gradients),
                call.joint,
            )
        )

    def __torch_dispatch__(
        self, func: Operator, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        scalar = func.overloadpacket is torch.ops.aten._local_scalar_dense
        if scalar and args[0].device.type == "meta":
            return False if args[0].dtype == torch.bool else 1  # no value decides what work is done
        result = call(func, args, kwargs or {})
        if func.overloadpacket is not torch.ops.aten.detach and not self.paused:
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Operator, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [x for x in leaves((args, kwargs)) if _differentiable(x)]
        made = [x for x in leaves(result) if _differentiable(x)]
        if not tensors or not made:
            return
        inputs, outputs = (tuple(self.index(t) for t in group) for group in (tensors, made))
        packet = func.overloadpacket
        if packet not in flop_registry:
            self.nodes.append(Node(inputs, outputs))
        else:
            forward = flop_registry[packet](*args, **kwargs, out_val=result)
            factors = _factors(packet, args)
            gradients = tuple((self.index(t), forward) for t in factors if _differentiable(t))
            self.nodes.append(Node(inputs, outputs, forward, gradients))


class _Spans:
    """Notes which operations each module ran and which values it returned."""

    def __init__(self) -> None:
        self._nodes: defaultdict[str, set[int]] = defaultdict(set)
        self._outputs: defaultdict[str, set[int]] = defaultdict(set)
        self._begun: list[int] = []

    @contextmanager
    def noting(self, model: nn.Module, recorder: _Recorder) -> Iterator[None]:
        """Watch every module of `model` while it runs."""
        handles = [
            handle
            for path, module in model.named_modules()
            for handle in self._watch(path, module, recorder)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def by_path(self) -> dict[str, Span]:
        """What was noted."""
        return {
            path: Span(frozenset(nodes), frozenset(self._outputs[path]))
            for path, nodes in self._nodes.items()
        }

    def _watch(self, path: str, module: nn.Module, recorder: _Recorder) -> list[RemovableHandle]:
        def before(module: nn.Module, args: Any) -> None:
            del module, args
            self._begun.append(len(recorder.nodes))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            self._nodes[path].update(range(self._begun.pop(), len(recorder.nodes)))
            made = (t for t in tree_flatten(output)[0] if _differentiable(t))
            self._outputs[path].update(recorder.index(t) for t in made)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


class _FusedAttention(TorchFunctionMode):
    """Notes attention as one operation where the device would run a fused kernel.

    On the meta device attention always falls apart into products; whether it does on a real one
    depends on the kernels there, the types and dropout, which PyTorch itself is asked about.
    """

    def __init__(self, recorder: _Recorder, device: torch.device) -> None:
        super().__init__()
        self._recorder = recorder
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        watched = func is scaled_dot_product_attention and not self._recorder.paused
        if not watched or not self._fused(args, kwargs):
            return func(*args, **kwargs)
        with self._recorder.resting():
            result = func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        inputs = tuple(self._recorder.index(t) for t in given if _differentiable(t))
        query, key, value = ([*args, *(kwargs.get(n) for n in _QKV[len(args) :])])[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        scores, mixed = _attention(query.shape, key.shape, value.shape)
        joint = 3 * scores + 2 * mixed  # the scores are computed once more
        corrections: tuple[tuple[frozenset[int], int], ...] = ()
        if self._device.type == "cpu" and mask is not None and _differentiable(mask):
            # the fused kernel of CPUs has no gradient of the mask: products instead
            q, k, v, m = (self._recorder.index(t) for t in (query, key, value, mask))
            corrections = (
                (frozenset({m}), mixed - joint),
                *((frozenset({m, each}), scores) for each in (q, k)),
                (frozenset({m, v}), mixed),
            )
        outputs = (self._recorder.index(result),)
        node = Node(inputs, outputs, scores + mixed, joint=joint, corrections=corrections)
        self._recorder.nodes.append(node)
        return result

    def _fused(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the device has a fused kernel for this call."""

        def real(tensor: Tensor) -> Tensor:
            size, stride = tensor.size(), tensor.stride()
            return torch.empty_strided(size, stride, dtype=tensor.dtype, device=self._device)

        if self._device.type == "meta":
            return False
        with self._recorder.resting():
            args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
            choice = torch._fused_sdp_choice(*args, **kwargs)
        return int(choice) != SDPBackend.MATH.value


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _factors(packet: Operator, args: Any) -> Sequence[Any]:
    """The two operands of a product: the gradient of each costs as much as the product."""
    added = packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
    operands: Sequence[Any] = args[1:3] if added else args[:2]
    return operands


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[int, int]:
    """FLOPs of the two products of attention: the scores, and the mix of values by them."""
    *batch, length, width = query
    products = 2 * math.prod(batch) * length * key[-2]
    return products * width, products * value[-1]
