"""LoRA and its kin, as PEFT has them: low-rank pairs beside every linear layer but the head."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA pairs on all linear layers but the head, which trains in full (Hu et al. 2022)."""
    return _with_pairs(model, rank)


def _with_pairs(model: nn.Module, rank: int, **settings: Any) -> nn.Module:
    from peft import LoraConfig, TaskType  # noqa: PLC0415 - slow to import

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        **settings,
    )
    return _adapted(model, config)


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model  # noqa: PLC0415 - slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a renamed attribute
        adapted: nn.Module = get_peft_model(model, config)
    return adapted
