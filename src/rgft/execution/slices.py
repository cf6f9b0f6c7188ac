"""Updates that differ between slices of one parameter, such as the heads of an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgft.execution.binding import Binding, Division
from rgft.shards import local


@dataclass(frozen=True, slots=True)
class Correction:
    """What is to be done to one parameter after each step at its largest multiplier.

    Attributes:
        parameter: The parameter.
        division: Its blocks.
        share: Each block's multiplier over the largest, `[blocks, 1, ...]`; None if all that train
            have the largest.
        frozen: Indices of the frozen blocks; None if there are none.
    """

    parameter: nn.Parameter
    division: Division
    share: Tensor | None
    frozen: Tensor | None


@dataclass(frozen=True, slots=True)
class Kept:
    """All weights of a parameter if they are scaled, and its frozen blocks, before the step."""

    weight: Tensor | None
    frozen: dict[str, Tensor]


class SliceUpdates:
    r"""Scales what a step did to each slice, after the fact.

    The step runs at the largest multiplier :math:`S` of the parameter's slices; a slice with
    multiplier :math:`m` then becomes :math:`w + (m / S) (w' - w)`. That is exact for optimizers
    whose update is linear in the learning rate (SGD, Adam, AdamW with its decoupled decay, ...).
    A frozen slice gets its old bits back, in the weights and in the optimizer's state.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._corrections: list[Correction] = []
        self._kept: list[Kept] = []

    @property
    def acts(self) -> bool:
        """Whether there is a parameter whose slices differ."""
        return bool(self._corrections)

    def adopt(self, lr_scale: Sequence[float]) -> None:
        """From the next step on, these are the components' multipliers."""
        self._corrections = []
        for parameter, division in self._binding.held.items():
            largest = max(self._binding.scales_of(parameter, lr_scale))
            scales = [lr_scale[owner] for owner in division.owners]
            if set(scales) - {largest}:
                self._corrections.append(_correction(parameter, division, scales, largest))

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy what the step would spoil."""
        self._kept = [_keep(correction, optimizer) for correction in self._corrections]

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct the slices after the step."""
        for correction, kept in zip(self._corrections, self._kept, strict=True):
            if correction.share is not None and kept.weight is not None:
                _scale(correction, correction.share, kept.weight)
            if correction.frozen is not None:
                _restore(correction, correction.frozen, kept.frozen, optimizer)
        self._kept = []


def _correction(
    parameter: nn.Parameter, division: Division, scales: list[float], largest: float
) -> Correction:
    device = parameter.device
    frozen = [i for i, scale in enumerate(scales) if scale == 0]
    share = None
    if set(scales) - {0.0, largest}:
        # half precision would round the multipliers; frozen blocks are restored afterwards
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        share = torch.tensor([s / largest if s else 1.0 for s in scales], dtype=dtype).to(device)
        assert division.dim is not None
        share = share.reshape(-1, *[1] * (parameter.ndim - division.dim))
    where = torch.tensor(frozen, device=device) if frozen else None
    return Correction(parameter, division, share, where)


def _keep(correction: Correction, optimizer: torch.optim.Optimizer) -> Kept:
    frozen = {}
    if correction.frozen is not None:
        for key, blocks, dim in _blocks(correction, optimizer):
            frozen[key] = blocks.index_select(dim, correction.frozen)
    scaled = correction.share is not None
    return Kept(local(correction.parameter.detach()).clone() if scaled else None, frozen)


def _scale(correction: Correction, share: Tensor, before: Tensor) -> None:
    blocks = correction.division.blocks
    new = blocks(local(correction.parameter.detach()))
    scaled = new.to(share.dtype)  # the weights themselves, if their precision is as high
    torch.lerp(blocks(before).to(share.dtype), scaled, share, out=scaled)
    new.copy_(scaled)


def _restore(
    correction: Correction,
    frozen: Tensor,
    kept: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """The old bits; zero in state that the optimizer made in this step."""
    for key, blocks, dim in _blocks(correction, optimizer):
        if key in kept:
            blocks.index_copy_(dim, frozen, kept[key])
        else:
            blocks.index_fill_(dim, frozen, 0)


def _blocks(
    correction: Correction, optimizer: torch.optim.Optimizer
) -> list[tuple[str, Tensor, int]]:
    """Blocks of the weights, under an empty name, and of state with a value per weight."""
    parameter, division = correction.parameter, correction.division
    assert division.dim is not None
    found = {"": local(parameter.detach())}
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            found[key] = local(value)
    return [(key, division.blocks(value), division.dim) for key, value in found.items()]
