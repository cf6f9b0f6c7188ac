"""What can be added to a model and trained in place of its own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rgft.adapters.bottleneck import add_bottlenecks, save_apart
from rgft.adapters.pairs import (
    add_adalora,
    add_dora,
    add_ia3,
    add_lora,
    add_rslora,
    save_merged,
)

__all__ = ["ADAPTERS", "Adapter"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A way to add something to a model.

    Attributes:
        add: Given a model and the value of the setting, freezes the model but for its new head, and
            adds modules.
        setting: Name of the setting: a rank, or a reduction; None where there is no choice.
        default: Its value where none is given.
        allocates: Whether ranks are pruned while it trains.
        save: Writes the trained model to a folder.
    """

    add: Callable[[nn.Module, int], nn.Module]
    setting: str | None = "lora_rank"
    default: int = 8
    allocates: bool = False
    save: Callable[[Any, Path], None] = save_merged


ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(add_lora),
    "rslora": Adapter(add_rslora),
    "dora": Adapter(add_dora),
    "adalora": Adapter(add_adalora, allocates=True),
    "ia3": Adapter(add_ia3, setting=None),
    "bottleneck": Adapter(add_bottlenecks, setting="reduction", default=16, save=save_apart),
}
