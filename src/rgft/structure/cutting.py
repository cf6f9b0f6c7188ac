"""A model without its last layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from rgft.errors import InputError
from rgft.structure.architecture import outline
from rgft.structure.layers import unwrapped

COUNT = "num_hidden_layers"  # transformers' name; a config maps its own to it


def keep_layers(model: nn.Module, count: int) -> None:
    """Cut a model down to its first `count` layers, in place.

    What comes after the layers (final norm, pooler, head) then reads the output of the last one
    that is left. The model's config says so, too, so that `save_pretrained` and `from_pretrained`
    go on working (Sajjad et al. 2023, "On the effect of dropping layers of pre-trained transformer
    models").

    Args:
        model: A Hugging Face transformer with one stack of layers. Cut it before an optimizer is
            built over it.
        count: Layers to keep, at least 1.

    Raises:
        InputError: The model has no such stack, or fewer layers.
    """
    stack, config = _stack(model), getattr(unwrapped(model), "config", None)
    if stack is None or getattr(config, COUNT, None) != len(stack):
        raise InputError(
            f"{type(unwrapped(model)).__name__} has no single stack of layers that its config "
            "counts; train it with all of them"
        )
    total = len(stack)
    if not 1 <= count <= total:
        raise InputError(f"keep_layers is {count}; this model has {total}: give 1 to {total}")
    del stack[count:]
    setattr(config, COUNT, count)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:count])


def can_cut(model: nn.Module) -> bool:
    """Whether `keep_layers` takes this model."""
    stack = _stack(model)
    config: Any = getattr(unwrapped(model), "config", None)
    return stack is not None and getattr(config, COUNT, None) == len(stack)


def count_layers(model: nn.Module) -> int:
    """How many layers a model has."""
    return sum(part.module is not None for part in outline(model))


def _stack(model: nn.Module) -> nn.ModuleList | None:
    """The one list that holds all layers and nothing else."""
    layers = [part.module for part in outline(model) if part.module is not None]
    for module in unwrapped(model).modules():
        if isinstance(module, nn.ModuleList) and list(module) == layers:
            return module
    return None
