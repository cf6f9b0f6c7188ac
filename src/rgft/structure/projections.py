"""The linear maps of an attention: which make queries, keys and values, which one mixes heads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter

from rgft.structure.layers import is_norm, plain

_SUFFIX = r"(?:_?(?:proj|lin|linear|layer|projection))?"
_ROLE = re.compile(rf"(?:to_|w)?(q|k|v|query|key|value){_SUFFIX}", re.IGNORECASE)
_OUT = re.compile(
    rf"(?:to_|w)?(?:o|out|output|dense|proj|c_proj|projection){_SUFFIX}", re.IGNORECASE
)


class UnsplittableError(Exception):
    """A model cannot be split at a granularity; the message says why."""


@dataclass(frozen=True, slots=True)
class Portion:
    """A parameter, or the part `start:stop` of it along a dimension."""

    parameter: Parameter
    dim: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        if self.dim is None:
            return self.parameter.numel()
        return self.parameter.numel() // self.parameter.shape[self.dim] * (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map of an attention.

    Attributes:
        name: Its name in the attention.
        module: The map, or the PEFT layer around it.
        inputs: Number of input features.
        outputs: Number of output features.
        transposed: Whether the weight is [inputs, outputs] as in GPT-2's Conv1D.
    """

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    transposed: bool

    def rows(self, start: int, stop: int) -> list[Portion]:
        """Weights, biases and LoRA B rows of the output features `start:stop`."""
        inner: Any = plain(self.module)
        found = [(inner.weight, int(self.transposed)), (inner.bias, 0)]
        for factor in _adapters(self.module, "lora_B"):
            found += [(factor.weight, 0), (factor.bias, 0)]
        return portions(found, self.outputs, start, stop)

    def columns(self, start: int, stop: int) -> list[Portion]:
        """Weights and LoRA A columns of the input features `start:stop`."""
        inner: Any = plain(self.module)
        found = [(inner.weight, 1 - int(self.transposed))]
        found += [(factor.weight, 1) for factor in _adapters(self.module, "lora_A")]
        return portions(found, self.inputs, start, stop)


def portions(
    tensors: list[tuple[Parameter | None, int]], features: int, start: int, stop: int
) -> list[Portion]:
    """The part `start:stop` of those tensors whose given dimension is that many features."""
    return [
        Portion(tensor, dim, start, stop)
        for tensor, dim in tensors
        if tensor is not None and tensor.shape[dim] == features
    ]


def find_projections(attention: nn.Module) -> tuple[list[Projection], Projection]:
    """The input projections (q, k and v, or one that is all three) and the output projection.

    Raises:
        UnsplittableError: If that is not what the attention consists of.
    """
    found = list(_linears(attention))
    outs = [p for p in found if _OUT.fullmatch(p.name)]
    if len(outs) != 1:
        raise UnsplittableError(f"{listed(found)} are not q, k, v and one output projection")
    rest = [p for p in found if p is not outs[0]]
    by_role = [[p for p in rest if _role(p.name) == role] for role in "qkv"]
    if all(len(projections) == 1 for projections in by_role):
        return [projections[0] for projections in by_role], outs[0]
    if len(rest) == 1 and rest[0].outputs > outs[0].inputs:
        return rest, outs[0]
    raise UnsplittableError(f"{listed(found)} are not q, k, v (apart or fused) and output")


def listed(projections: list[Projection]) -> str:
    """Their names, for a message."""
    return ", ".join(p.name for p in projections) or "the parts of an attention"


def _linears(module: nn.Module) -> Iterator[Projection]:
    for name, child in module.named_children():
        inner = plain(child)
        weight = getattr(inner, "weight", None)
        if isinstance(inner, nn.Linear) and isinstance(weight, Parameter):
            if tuple(weight.shape) != (inner.out_features, inner.in_features):
                raise UnsplittableError(f"the weight of {name} is packed")
            yield Projection(name, child, inner.in_features, inner.out_features, False)
        elif type(inner).__name__ == "Conv1D" and isinstance(weight, Parameter):
            yield Projection(name, child, weight.shape[0], weight.shape[1], True)
        elif not is_norm(child):
            yield from _linears(child)


def _role(name: str) -> str | None:
    match = _ROLE.fullmatch(name)
    return match[1][0].lower() if match else None


def _adapters(module: nn.Module, factor: str) -> list[Any]:
    """The LoRA factors of all adapters of a projection."""
    factors = getattr(module, factor, None)
    return list(factors.values()) if isinstance(factors, nn.ModuleDict) else []
