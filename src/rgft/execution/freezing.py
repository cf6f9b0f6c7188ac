"""Freezing: no gradient for frozen parameters, so that backward stops below the trained ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def apply_freezing(scale: Mapping[nn.Parameter, float], *, probing: bool) -> None:
    """Make exactly the planned parameters require a gradient in the next forward pass.

    Args:
        scale: Multiplier of each parameter; 0 freezes.
        probing: Whether frozen parameters get a gradient too, to be scored and then dropped.
    """
    for parameter, multiplier in scale.items():
        parameter.requires_grad_(multiplier > 0 or probing)
    drop_gradients(scale)


def drop_gradients(scale: Mapping[nn.Parameter, float]) -> None:
    """Forget gradients of parameters with multiplier 0, so that no step can use them."""
    for parameter, multiplier in scale.items():
        if multiplier == 0:
            parameter.grad = None
