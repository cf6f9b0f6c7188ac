"""Multipliers for optimizers that choose their own learning rate and ignore that of the group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def chooses_its_rate(group: Mapping[str, Any]) -> bool:
    """Whether steps of this group ignore its `lr`: Adafactor with relative steps."""
    return bool(group.get("relative_step", False))


class RelativeUpdates:
    r"""Scales what a step did to each parameter, after the fact: :math:`w + m (w' - w)`.

    Exact up to rounding where the update is linear in the rate, as Adafactor's is. It costs a copy
    of the parameters whose multiplier is neither 0 nor 1.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor, float]] = []

    def enter(self, optimizer: torch.optim.Optimizer, scale: Mapping[nn.Parameter, float]) -> None:
        """Copy what the step will change."""
        self._kept = [
            (parameter, parameter.detach().clone(), scale[parameter])
            for group in optimizer.param_groups
            if chooses_its_rate(group)
            for parameter in group["params"]
            if scale.get(parameter, 1.0) not in (0.0, 1.0) and parameter.grad is not None
        ]

    def leave(self) -> None:
        """Scale the change."""
        for parameter, before, multiplier in self._kept:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            old, new = before.to(wide), parameter.detach().to(wide)
            parameter.detach().copy_(torch.lerp(old, new, multiplier))
        self._kept = []
