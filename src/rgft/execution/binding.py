"""Which live parameters each component stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice
from rgft.errors import InputError
from rgft.shards import extent, is_sharded, local


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice of a live parameter and the index of the component that owns it.

    Attributes:
        component: The index.
        parameter: The parameter.
        slice: Of the whole parameter.
        held: The same in the part of the parameter that this process holds; perhaps empty.
    """

    component: int
    parameter: nn.Parameter
    slice: ParameterSlice
    held: ParameterSlice

    @property
    def weight(self) -> Tensor:
        """The present values, without gradient tracking."""
        return self.held.of(local(self.parameter.detach()))

    @property
    def grad(self) -> Tensor:
        """The present gradient; the parameter must have one."""
        assert self.parameter.grad is not None
        return self.held.of(local(self.parameter.grad))


@dataclass(frozen=True, slots=True)
class Division:
    """How one parameter is divided among components, so that one call can treat all its slices.

    Attributes:
        dim: Dimension along which it is divided into equal blocks; None if one component owns it.
        owners: Component of each block.
    """

    dim: int | None
    owners: tuple[int, ...]

    def blocks(self, tensor: Tensor) -> Tensor:
        """The view of `tensor` (of the parameter's shape) that has the blocks along `dim`."""
        return (
            tensor
            if self.dim is None
            else torch.unflatten(tensor, self.dim, (len(self.owners), -1))
        )

    def held(self, parameter: nn.Parameter) -> Division:
        """How the part of the parameter that this process holds is divided."""
        if self.dim is None or not is_sharded(parameter):
            return self
        begin, end = extent(parameter, self.dim)
        size = parameter.shape[self.dim] // len(self.owners)
        fine = math.gcd(size, begin, end)  # a process may hold a part of a block
        return Division(self.dim, tuple(self.owners[i // size] for i in range(begin, end, fine)))


@dataclass(frozen=True, slots=True)
class Binding:
    """Components that can be adapted, tied to live parameters.

    Attributes:
        components: Those of the partition that hold at least one adaptable parameter, with their
            adaptable slices and elements alone.
        pieces: Their slices, ordered by component.
        parameters: Adaptable parameters by name: in the optimizer and requiring a gradient.
        pieces_of: For each adaptable parameter, the indices of its pieces.
        divisions: For each adaptable parameter, how components share it.
        held: The same of the parts of them that this process holds.
    """

    components: tuple[Component, ...]
    pieces: tuple[Piece, ...]
    parameters: dict[str, nn.Parameter]
    pieces_of: dict[nn.Parameter, tuple[int, ...]]
    divisions: dict[nn.Parameter, Division]
    held: dict[nn.Parameter, Division]

    @property
    def sharded(self) -> bool:
        """Whether processes hold parts of the parameters (FSDP2)."""
        return any(map(is_sharded, self.parameters.values()))

    @property
    def device(self) -> torch.device:
        """Where scores are gathered."""
        return self.pieces[0].parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of scores: float64 if any parameter is, else float32."""
        doubles = any(p.dtype == torch.float64 for p in self.parameters.values())
        return torch.float64 if doubles and self.device.type != "mps" else torch.float32

    def numel(self) -> Tensor:
        """Adaptable parameter elements per component, `[K]`."""
        count = [component.numel for component in self.components]
        return torch.tensor(count, dtype=self.dtype, device=self.device)

    def scales_of(self, parameter: nn.Parameter, lr_scale: Sequence[float]) -> list[float]:
        """The multipliers of a parameter's blocks."""
        return [lr_scale[owner] for owner in self.divisions[parameter].owners]


def bind(
    model: nn.Module, optimizer: torch.optim.Optimizer, components: Sequence[Component]
) -> Binding:
    """Tie `components` to what `optimizer` updates in `model`.

    Parameters that are not in the optimizer or that do not require a gradient now are left alone
    for good.

    Raises:
        InputError: The optimizer updates nothing of the model.
    """
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    adaptable = {n: p for n, p in model.named_parameters() if p in optimized and p.requires_grad}
    if not adaptable:
        raise InputError(
            "the optimizer holds no parameter of this model that requires a gradient; "
            "build the optimizer from model.parameters() and then the Guide"
        )
    kept: list[Component] = []
    pieces: list[Piece] = []
    pieces_of: dict[nn.Parameter, tuple[int, ...]] = {}
    for component in components:
        slices = [s for s in component.slices if s.parameter in adaptable]
        for part in slices:
            parameter = adaptable[part.parameter]
            pieces_of[parameter] = (*pieces_of.get(parameter, ()), len(pieces))
            pieces.append(Piece(len(kept), parameter, part, _held(part, parameter)))
        if slices:
            numel = sum(_numel(s, adaptable[s.parameter]) for s in slices)
            kept.append(replace(component, slices=tuple(slices), numel=numel))
    divisions = {
        parameter: _division(parameter, [pieces[i] for i in indices])
        for parameter, indices in pieces_of.items()
    }
    held = {parameter: division.held(parameter) for parameter, division in divisions.items()}
    return Binding(tuple(kept), tuple(pieces), adaptable, pieces_of, divisions, held)


def _held(part: ParameterSlice, parameter: nn.Parameter) -> ParameterSlice:
    """A slice in the part of the parameter that this process holds."""
    if part.dim is None or not is_sharded(parameter):
        return part
    begin, end = extent(parameter, part.dim)
    start, stop = (min(max(at, begin), end) - begin for at in (part.start, part.stop))
    return ParameterSlice(part.parameter, part.dim, start, stop)


def _numel(part: ParameterSlice, parameter: nn.Parameter) -> int:
    if part.dim is None:
        return parameter.numel()
    return parameter.numel() // parameter.shape[part.dim] * (part.stop - part.start)


def _division(parameter: nn.Parameter, pieces: Sequence[Piece]) -> Division:
    """Blocks as large as the bounds of the pieces allow; for attention heads, the heads."""
    if len(pieces) == 1:
        return Division(None, (pieces[0].component,))
    (dim,) = {piece.slice.dim for piece in pieces}
    assert dim is not None
    length = parameter.shape[dim]
    bounds = [bound for p in pieces for bound in (p.slice.start, p.slice.stop)]
    size = math.gcd(length, *bounds)
    owner = {
        block: p.component
        for p in pieces
        for block in range(p.slice.start // size, p.slice.stop // size)
    }
    return Division(dim, tuple(owner[block] for block in range(length // size)))
