"""Gradient checkpointing and truncation together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rgft.errors import InputError


def restore_truncation(model: nn.Module, *, freezes: bool) -> None:
    """Let backward stop below what trains, where transformers has made embeddings pass gradients.

    It does so whenever checkpointing is enabled, for the sake of the reentrant kind, which computes
    no gradients in a block whose inputs need none. The other kind does not need it.

    Args:
        model: Before its first step.
        freezes: Whether plans freeze anything.

    Raises:
        InputError: They do, and the checkpointing is of the reentrant kind.
    """
    if freezes and any(_reentrant(model)):
        raise InputError(
            "gradient checkpointing is reentrant here, which needs a gradient all the way down to "
            "the embeddings, so that freezing would save nothing; checkpoint with "
            "use_reentrant=False"
        )
    for module in model.modules():
        # wrappers look attributes up in the model that they wrap: take each model once
        if not vars(module).get("_require_grads_hooks"):
            continue
        kinds = list(_reentrant(module))
        if kinds and not any(kinds):
            module.disable_input_require_grads()  # type: ignore[operator]


def _reentrant(model: nn.Module) -> Iterator[bool]:
    """For each module that checkpoints its layers, whether it does so in the reentrant way."""
    for module in model.modules():
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and getattr(module, "gradient_checkpointing", False):
            settings = getattr(checkpoint, "keywords", {})
            yield bool(settings.get("use_reentrant", True))
