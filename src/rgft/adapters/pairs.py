"""LoRA and its kin, as PEFT has them; the new head trains in full beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from rgft.adapters.folders import ADAPTER
from rgft.errors import InputError
from rgft.structure.architecture import outline
from rgft.structure.layers import is_linear

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
    from peft import AdaLoraConfig  # noqa: PLC0415 - slow to import

    first = round(SURPLUS * rank)
    config = AdaLoraConfig(
        **_task(model),
        init_r=first,
        target_r=rank,
        lora_alpha=2 * first,
        target_modules=_linear(model),
        total_step=1,  # known, and set, when training starts
    )
    return _adapted(model, config)


def add_ia3(model: nn.Module, _: int) -> nn.Module:
    """Factors on keys, values and inner feed-forward activations (IA3; Liu et al. 2022).

    Raises:
        InputError: PEFT does not know where these are in this model.
    """
    from peft import IA3Config  # noqa: PLC0415 - slow to import

    try:
        return _adapted(model, IA3Config(**_task(model)))
    except ValueError as error:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"PEFT does not know where to put IA3's factors in a model of type {kind!r}; take "
            "--method lora, or another model"
        ) from error


def save_merged(model: Any, folder: Path) -> None:
    """The model with what was added merged in, and that by itself, as PEFT loads it."""
    model.save_pretrained(folder / ADAPTER)
    model.merge_and_unload().save_pretrained(folder)


def _with_lora(model: nn.Module, rank: int, **settings: Any) -> nn.Module:
    from peft import LoraConfig  # noqa: PLC0415 - slow to import

    config = LoraConfig(**_task(model), r=rank, target_modules=_linear(model), **settings)
    return _adapted(model, config)


def _task(model: nn.Module) -> dict[str, Any]:
    """How PEFT is told what the model is for; it has no type for classifiers of images."""
    from peft import TaskType  # noqa: PLC0415 - slow to import

    if getattr(model, "main_input_name", None) == "pixel_values":
        return {"exclude_modules": _heads(model), "modules_to_save": _heads(model)}
    if not _writes(model):
        return {"task_type": TaskType.SEQ_CLS}
    config: Any = model.config
    return {"task_type": TaskType.SEQ_2_SEQ_LM if config.is_encoder_decoder else TaskType.CAUSAL_LM}


def _writes(model: nn.Module) -> bool:
    """Whether a model of transformers is one that writes texts."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def _heads(model: nn.Module) -> list[str]:
    return [part.name.rpartition(".")[2] for part in outline(model) if part.kind == "head"]


def _linear(model: nn.Module) -> str:
    """PEFT's word for all linear maps but the head.

    Raises:
        InputError: There are none.
    """
    maps = [name for name, m in model.named_modules() if is_linear(m)]
    if all(name.rpartition(".")[2] in _heads(model) for name in maps):
        raise InputError(
            f"{type(model).__name__} has no linear layers but its head, and LoRA is for those; "
            "give another --method"
        )
    return "all-linear"


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model  # noqa: PLC0415 - slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a renamed attribute
        adapted: nn.Module = get_peft_model(model, config)
    return adapted
