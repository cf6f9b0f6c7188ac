"""LoRA and its kin, as PEFT has them; the new head trains in full beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from rgft.errors import InputError

RANK_STABILIZED_ALPHA = 16  # the rank's square root is the divisor, not the rank
SURPLUS = 1.5  # ranks that AdaLoRA starts with, for each that it ends with (Zhang et al. 2023)


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA pairs on all linear layers but the head, scaled by 2 (Hu et al. 2022)."""
    return _with_lora(model, rank, lora_alpha=2 * rank)


def add_rslora(model: nn.Module, rank: int) -> nn.Module:
    r"""The same, scaled by :math:`16 / \sqrt{r}` (rsLoRA; Kalajdzievski 2023)."""
    return _with_lora(model, rank, lora_alpha=RANK_STABILIZED_ALPHA, use_rslora=True)


def add_dora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA on the direction of each weight, and a trained magnitude (DoRA; Liu et al. 2024)."""
    return _with_lora(model, rank, lora_alpha=2 * rank, use_dora=True)


def add_adalora(model: nn.Module, rank: int) -> nn.Module:
    """Triplets P Λ Q on all linear layers, of a mean rank in the end (Zhang et al. 2023).

    They begin with half as many ranks again; which of them go is decided while training, see
    `rgft.adapters.allocation`.
    """
    from peft import AdaLoraConfig, TaskType  # noqa: PLC0415 - slow to import

    first = round(SURPLUS * rank)
    config = AdaLoraConfig(
        task_type=TaskType.SEQ_CLS,
        init_r=first,
        target_r=rank,
        lora_alpha=2 * first,
        target_modules="all-linear",
        total_step=1,  # known, and set, when training starts
    )
    return _adapted(model, config)


def add_ia3(model: nn.Module, _: int) -> nn.Module:
    """Factors on keys, values and inner feed-forward activations (IA3; Liu et al. 2022).

    Raises:
        InputError: PEFT does not know where these are in this model.
    """
    from peft import IA3Config, TaskType  # noqa: PLC0415 - slow to import

    try:
        return _adapted(model, IA3Config(task_type=TaskType.SEQ_CLS))
    except ValueError as error:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"PEFT does not know where to put IA3's factors in a model of type {kind!r}; take "
            "--method lora, or another model"
        ) from error


def save_merged(model: Any, folder: Path) -> None:
    """The model with what was added merged in, and that by itself, as PEFT loads it."""
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder)


def _with_lora(model: nn.Module, rank: int, **settings: Any) -> nn.Module:
    from peft import LoraConfig, TaskType  # noqa: PLC0415 - slow to import

    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, target_modules="all-linear", **settings)
    return _adapted(model, config)


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model  # noqa: PLC0415 - slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a renamed attribute
        adapted: nn.Module = get_peft_model(model, config)
    return adapted
