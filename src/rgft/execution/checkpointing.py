"""Gradient checkpointing and truncation together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from rgft.errors import InputError

# the hooks of transformers, and of peft where a model has none
PASS_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")


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
    _truncate(_embeddings(model))


def keep_truncation(model: nn.Module) -> list[RemovableHandle]:
    """The same before each forward pass; TRL's DPO checkpoints anew after its reference model."""
    found = _embeddings(model)
    return [model.register_forward_pre_hook(lambda *_: _truncate(found))] if found else []


def _embeddings(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Models that can make their embeddings pass gradients, with these embeddings."""
    found = []
    for module in model.modules():
        # of the type: wrappers look attributes up in the model that they wrap
        if hasattr(type(module), "enable_input_require_grads"):
            with suppress(NotImplementedError):
                embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
                if isinstance(embeddings, nn.Module):
                    found.append((module, embeddings))
    return found


def _truncate(found: list[tuple[nn.Module, nn.Module]]) -> None:
    """Remove all hooks that make embeddings pass gradients; transformers remembers the last."""
    for module, embeddings in found:
        hooks = [k for k, h in embeddings._forward_hooks.items() if _name(h) in PASS_GRADIENTS]
        if hooks and (kinds := list(_reentrant(module))) and not any(kinds):
            for key in hooks:
                del embeddings._forward_hooks[key]


def _name(hook: Any) -> str:
    return str(getattr(hook, "__name__", ""))


def _reentrant(model: nn.Module) -> Iterator[bool]:
    """For each module that checkpoints its layers, whether it does so in the reentrant way."""
    for module in model.modules():
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and getattr(module, "gradient_checkpointing", False):
            settings = getattr(checkpoint, "keywords", {})
            yield bool(settings.get("use_reentrant", True))
