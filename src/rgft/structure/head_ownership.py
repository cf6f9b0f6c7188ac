"""Which head reads which projected feature of an attention, measured.

Whether a projection keeps its heads one after the other, fused with others or interleaved cannot
be told from its shape. So a copy of the attention runs once on a few random features, each
multiplied by a gate of one: the gradient of head h's chunk of the output projection's input with
respect to the gates is non-zero exactly at the features that head h reads. Weights play no part,
so it works on the meta device too and costs no memory.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rgft.structure.layers import is_norm
from rgft.structure.projections import Projection

Forward = Callable[..., Tensor]

_POSITIONS = 3  # with fewer, a causal attention would not depend on its queries


class UnmeasurableError(Exception):
    """The attention cannot be run on its own."""


def measure(
    attention: nn.Module, inputs: list[Projection], output: Projection, heads: int
) -> Tensor:
    """Which heads read which projected feature.

    Args:
        attention: The module that holds the projections; it is neither run nor changed.
        inputs: Projections of the hidden states: q, k and v, or one that is all three.
        output: The projection of the heads' concatenated outputs.
        heads: Number of query heads H.

    Returns:
        bool [features of all inputs, H].

    Raises:
        UnmeasurableError: If the copy cannot be run with hidden states alone.
    """
    twin, twins = _twin(attention, [p.module for p in (*inputs, output)])
    random = torch.Generator().manual_seed(0)
    gates = [torch.ones(p.outputs, requires_grad=True) for p in inputs]
    for module, gate in zip(twins[:-1], gates, strict=True):
        _replace(module, _gated(gate, random))
    _replace(twins[-1], _capture)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixed = _mixed(twin, inputs[0].inputs, output.inputs // heads)
            weighted = mixed * torch.randn(mixed.shape, generator=random)
            per_head = weighted.reshape(-1, heads, mixed.shape[-1] // heads).sum((0, 2))
            columns = [torch.autograd.grad(x, gates, retain_graph=True) for x in per_head]
    except Exception as error:  # whatever a foreign forward pass may raise
        raise UnmeasurableError(f"{type(attention).__name__} cannot be run alone") from error
    gradient = torch.stack([torch.cat(column) for column in columns], dim=1)
    if not gradient.isfinite().all():
        raise UnmeasurableError(f"{type(attention).__name__} is not finite on random features")
    return gradient != 0


class _CapturedError(Exception):
    """Ends the forward pass where the wanted value is known."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _twin(attention: nn.Module, wanted: list[nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    """A CPU copy for evaluation, without hooks, weights or norms, and its `wanted` modules."""
    memo: dict[int, Any] = {}
    for parameter in attention.parameters():
        memo[id(parameter)] = Parameter(torch.ones(()).expand(parameter.shape), False)
    for buffer in attention.buffers():
        if buffer.device.type != "cpu":
            memo[id(buffer)] = torch.ones((), dtype=buffer.dtype).expand(buffer.shape)
    for module in attention.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in memo:
            memo[id(config)] = copy.copy(config)
            memo[id(config)]._attn_implementation = "eager"  # the others may need a GPU
    twin = copy.deepcopy(attention, memo).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if is_norm(module):  # one over all heads would tie each to the others
            _replace(module, _identity)
    paths = {id(module): path for path, module in attention.named_modules()}
    return twin, [twin.get_submodule(paths[id(module)]) for module in wanted]


def _replace(module: nn.Module, forward: Forward) -> None:
    module.forward = forward


def _identity(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden


def _capture(hidden: Tensor, *_: object, **__: object) -> Tensor:
    raise _CapturedError(hidden)


def _gated(gate: Tensor, random: torch.Generator) -> Forward:
    def forward(hidden: Tensor, *_: object, **__: object) -> Tensor:
        return torch.randn((*hidden.shape[:-1], len(gate)), generator=random) * gate

    return forward


def _mixed(twin: nn.Module, width: int, head_size: int) -> Tensor:
    """What the output projection of the twin is given."""
    hidden = torch.ones(1, _POSITIONS, width)
    try:
        twin(hidden, **_arguments(twin, hidden, head_size))
    except _CapturedError as captured:
        return captured.value
    raise UnmeasurableError("the output projection was not called")


def _arguments(twin: nn.Module, hidden: Tensor, head_size: int) -> dict[str, object]:
    """What a forward pass needs besides hidden states; a rotation by no angle where it rotates."""
    cosine = torch.ones(1, _POSITIONS, head_size)
    known = {
        "position_embeddings": (cosine, torch.zeros_like(cosine)),
        "key_value_states": hidden,
        "residual": hidden,
    }
    return {
        name: known.get(name)
        for name, parameter in list(inspect.signature(twin.forward).parameters.items())[1:]
        if name in known or (parameter.default is parameter.empty and _is_named(parameter))
    }


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
