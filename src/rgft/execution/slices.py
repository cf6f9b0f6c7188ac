"""Updates that differ between slices of one parameter, such as the heads of an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgft.execution.binding import Binding


class SliceUpdates:
    r"""Scales what a step did to each slice, after the fact.

    The step runs at the largest multiplier :math:`S` of the parameter's slices; a slice with
    multiplier :math:`m` then becomes :math:`w + (m / S) (w' - w)`. That is exact for optimizers
    whose update is linear in the learning rate (SGD, Adam, AdamW with its decoupled decay, ...).
    A frozen slice gets its old bits back, in the weights and in the optimizer's state.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._before: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []

    def enter(self, optimizer: torch.optim.Optimizer, lr_scale: Sequence[float]) -> None:
        """Copy the parameters whose slices have different multipliers, with their state."""
        self._before = []
        for parameter in self._binding.parameters.values():
            if len(set(self._binding.scales_of(parameter, lr_scale))) > 1:
                state = _slicable(optimizer.state.get(parameter, {}), parameter)
                copies = {key: value.clone() for key, value in state.items()}
                self._before.append((parameter, parameter.detach().clone(), copies))

    def leave(self, optimizer: torch.optim.Optimizer, lr_scale: Sequence[float]) -> None:
        """Correct the slices after the step."""
        for parameter, before, copies in self._before:
            state = _slicable(optimizer.state.get(parameter, {}), parameter)
            largest = max(self._binding.scales_of(parameter, lr_scale))
            for index in self._binding.pieces_of[parameter]:
                piece = self._binding.pieces[index]
                scale, old = lr_scale[piece.component], piece.slice.of(before)
                if scale == 0:
                    piece.weight.copy_(old)
                    for key, value in state.items():
                        kept = copies.get(key, torch.zeros_like(value))
                        piece.slice.of(value).copy_(piece.slice.of(kept))
                elif scale != largest:
                    piece.weight.copy_(torch.lerp(old, piece.weight, scale / largest))
        self._before = []


def _slicable(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Tensor]:
    """Optimizer state that has one value per parameter element."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
