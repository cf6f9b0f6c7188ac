"""The part of a run's recipe that the Trainer carries out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from rgft.budgeting import MOST_VISITS
from rgft.checkpoints import FOLDER
from rgft.execution.galore import GaLoreAdamW, projected_weights
from rgft.preparation import Prepared
from rgft.spec import RunSpec
from rgft.spending import parse_budget

WARMUP_SHARE = 0.06  # of all steps; RoBERTa's setting for GLUE (Liu et al. 2019)
WEIGHT_DECAY = 0.01
USUAL, LEAST_STEPS = 4, 10  # evaluations per epoch, and steps between two, where not given


def training_arguments(spec: RunSpec, prepared: Prepared, output_dir: Path) -> TrainingArguments:
    """AdamW, a rise and a linear fall of the rate, evaluations and checkpoints at intervals."""
    steps_per_epoch = math.ceil(len(prepared.examples["train"]) / prepared.batch_size)
    # with a budget training stops when it is spent, however cheap its steps
    epochs = spec.epochs if spec.budget is None else math.ceil(spec.epochs * MOST_VISITS)
    total = math.ceil(epochs * steps_per_epoch)
    interval = min(total, math.ceil(steps_per_epoch / evaluations_per_epoch(spec, prepared)))
    by_steps = "steps" if spec.budget is None else "no"
    return TrainingArguments(
        output_dir=str(output_dir / FOLDER),
        num_train_epochs=epochs,
        max_steps=-1 if spec.budget is None else total,
        ignore_data_skip=spec.budget is not None,  # the visits know their place
        per_device_train_batch_size=prepared.batch_size,
        per_device_eval_batch_size=prepared.inputs.evaluation_batch,
        learning_rate=prepared.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(WARMUP_SHARE * total),
        weight_decay=WEIGHT_DECAY,
        adam_beta2=prepared.adam_beta2,
        bf16=spec.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        seed=spec.seed,
        data_seed=spec.seed,
        eval_strategy=by_steps,
        eval_steps=interval,
        save_strategy=by_steps,
        save_steps=interval,
        save_total_limit=2,
        logging_steps=max(1, min(10, interval)),
        logging_nan_inf_filter=False,
        metric_for_best_model=prepared.task.metric if prepared.auto else None,
        ddp_find_unused_parameters=True,  # what is frozen
        average_tokens_across_devices=False,  # else it multiplies some models' losses
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def optimizer(
    prepared: Prepared, arguments: TrainingArguments
) -> tuple[type[GaLoreAdamW], dict[str, Any]] | None:
    """What the Trainer makes its optimizer from; None for its own AdamW."""
    if prepared.projection is None:
        return None
    return GaLoreAdamW, {
        "projected": projected_weights(prepared.model),
        "projection": prepared.projection,
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }


def evaluations_per_epoch(spec: RunSpec, prepared: Prepared) -> float:
    """Evaluations per epoch, about.

    By default `USUAL`, or fewer on small data, where each would take longer than what is trained
    between two: then at least `LEAST_STEPS` steps, and the rows of the validation split, are.
    """
    if spec.evaluations is not None:
        return spec.evaluations
    rows = len(prepared.examples["train"])
    least = max(LEAST_STEPS * prepared.batch_size, len(prepared.examples["validation"]))
    return min(USUAL, rows / least)


def evaluations_within_budget(spec: RunSpec, prepared: Prepared) -> int:
    """Evaluations of a run with a budget: as many as full fine-tuning has for that share."""
    assert spec.budget is not None
    share = parse_budget(spec.budget).share or 1.0
    return max(1, round(evaluations_per_epoch(spec, prepared) * spec.epochs * share))
