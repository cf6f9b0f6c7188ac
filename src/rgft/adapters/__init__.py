"""What can be added to a model and trained in place of its own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rgft.adapters.pairs import add_adalora, add_dora, add_ia3, add_lora, add_rslora

__all__ = ["ADAPTERS", "Adapter"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A way to add something to a model.

    Attributes:
        add: Given a model and a size, freezes the model but for its new head, and adds modules.
        setting: Name of the setting that is the size; None where there is no choice.
        size: Where it is not given.
        allocates: Whether ranks are pruned while it trains.
    """

    add: Callable[[nn.Module, int], nn.Module]
    setting: str | None = "lora_rank"
    size: int = 8
    allocates: bool = False


ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(add_lora),
    "rslora": Adapter(add_rslora),
    "dora": Adapter(add_dora),
    "adalora": Adapter(add_adalora, allocates=True),
    "ia3": Adapter(add_ia3, setting=None),
}
