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

    def __init__(self) -> None:
        self._before: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []

    def enter(
        self, binding: Binding, optimizer: torch.optim.Optimizer, lr_scale: Sequence[float]
    ) -> dict[nn.Parameter, float]:
        """Copy what is to be corrected; return the multiplier each parameter steps with."""
        self._before = []
        step_scale: dict[nn.Parameter, float] = {}
        for parameter in binding.parameters.values():
            scales = binding.scales_of(parameter, lr_scale)
            step_scale[parameter] = max(scales)
            if min(scales) != max(scales):
                state = _slicable(optimizer.state.get(parameter, {}), parameter)
                copies = {key: value.clone() for key, value in state.items()}
                self._before.append((parameter, parameter.detach().clone(), copies))
        return step_scale

    def leave(
        self, binding: Binding, optimizer: torch.optim.Optimizer, lr_scale: Sequence[float]
    ) -> None:
        """Correct the slices after the step."""
        for parameter, before, copies in self._before:
            state = _slicable(optimizer.state.get(parameter, {}), parameter)
            largest = max(binding.scales_of(parameter, lr_scale))
            for index in binding.pieces_of[parameter]:
                piece = binding.pieces[index]
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
