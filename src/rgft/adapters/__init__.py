"""What can be added to a model and trained in place of its own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rgft.adapters.pairs import add_lora

__all__ = ["ADAPTERS", "Adapter"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A way to add something to a model.

    Attributes:
        add: Given a model and a size, freezes the model but for its new head, and adds modules.
        setting: Name of the setting that is the size.
        size: Where it is not given.
    """

    add: Callable[[nn.Module, int], nn.Module]
    setting: str
    size: int


ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(add_lora, "lora_rank", 8),
}
