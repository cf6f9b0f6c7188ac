"""Freezing: no gradient for frozen parameters, so that backward stops below the trained ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def apply_freezing(scale: Mapping[nn.Parameter, float], probed: Collection[nn.Parameter]) -> None:
    """Make exactly the planned parameters require a gradient in the next forward pass.

    Args:
        scale: Multiplier of each parameter; 0 freezes.
        probed: Parameters that get a gradient even if frozen, to be scored and then dropped.
    """
    for parameter, multiplier in scale.items():
        parameter.requires_grad_(multiplier > 0 or parameter in probed)
    drop_gradients(scale)


def drop_gradients(scale: Mapping[nn.Parameter, float]) -> None:
    """Forget gradients of parameters with multiplier 0, so that no step can use them."""
    for parameter, multiplier in scale.items():
        if multiplier == 0:
            parameter.grad = None
