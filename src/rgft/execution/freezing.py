"""Freezing: a frozen parameter has no gradient, so that backward stops below the last trained one."""

from __future__ import annotations

from collections.abc import Sequence

from rgft.execution.binding import Binding


def apply_freezing(binding: Binding, lr_scale: Sequence[float], *, probing: bool) -> None:
    """Make exactly the planned parameters require a gradient in the next forward pass.

    A parameter shared by several components (attention heads) trains while any of them does.

    Args:
        binding: What may be touched.
        lr_scale: Multipliers per component; 0 freezes.
        probing: Whether frozen parameters get a gradient too, to be scored and then dropped.
    """
    for parameter in binding.parameters.values():
        trains = any(binding.scales_of(parameter, lr_scale))
        parameter.requires_grad_(trains or probing)
        if not trains:
            parameter.grad = None


def drop_frozen_gradients(binding: Binding, lr_scale: Sequence[float]) -> None:
    """Forget gradients of frozen parameters, so that no optimizer step can use them."""
    for parameter in binding.parameters.values():
        if not any(binding.scales_of(parameter, lr_scale)):
            parameter.grad = None
