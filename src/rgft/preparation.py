"""From what to run to a model, data and settings that are ready to train."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn
from transformers import set_seed

from rgft.batches import Collator, Example, tokenize
from rgft.budgeting import (
    STANDARD_BATCH,
    SURVEY_SHARE,
    batch_shapes,
    charged_survey,
    full_fine_tuning_flops,
    survey_batches,
)
from rgft.config import Config
from rgft.costs import CostModel, FlopMeter
from rgft.errors import InputError
from rgft.guide import Guide
from rgft.methods import Method, Recipe, find_method
from rgft.models import load_classifier, load_tokenizer
from rgft.progress import waiting
from rgft.settings import method_config
from rgft.spec import RunSpec
from rgft.spending import Spending, parse_budget
from rgft.survey import Survey
from rgft.tasks import TaskData, load_folder, load_task


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run, ready to start."""

    task: TaskData
    tokenizer: Any
    model: nn.Module
    method: Method
    config: Config
    lr: float
    meter: FlopMeter
    examples: dict[str, list[Example]]
    batch_size: int
    spending: Spending | None = None
    survey: Survey | None = None

    def sample_losses(self, count: int) -> Iterator[Tensor]:
        """Losses of the first training samples one by one, for the signals that need them.

        They count as spent, and not as batches that full fine-tuning would run.
        """
        collate = Collator(self.tokenizer)
        device = next(self.model.parameters()).device
        for example in self.examples["train"][:count]:
            batch = {k: v.to(device) for k, v in collate([example]).items()}
            with self.meter.probing():
                loss = self.model(**batch).loss
            yield loss


def load_data(spec: RunSpec) -> TaskData:
    """The task or the user's own data."""
    folder = None if spec.data is None else Path(spec.data)
    if spec.task is not None:
        if spec.text_columns or spec.label_column:
            raise InputError(
                "--text-columns and --label-column go with --data alone, not with --task"
            )
        return load_task(spec.task, folder)
    assert folder is not None
    return load_folder(folder, spec.text_columns, spec.label_column)


def prepare(spec: RunSpec) -> Prepared:
    """Load what `spec` names, and check that it goes together.

    Raises:
        InputError: It does not, or something cannot be loaded.
    """
    method = find_method(spec.method)
    config, rank = method_config(spec, method)
    with waiting(f"loading the tokenizer of {escape(spec.model)}"):
        tokenizer = load_tokenizer(spec.model)
    with waiting("loading the data"):
        task = load_data(spec)
    longest = min(spec.max_length, tokenizer.model_max_length)
    set_seed(spec.seed)
    with waiting(f"loading the model {escape(spec.model)}"):
        model = load_classifier(spec.model, task.label_names, tokenizer.pad_token_id)
    with waiting("setting up the method"):
        reference = CostModel(model)
        if method.lora:
            model = add_lora(model, rank)
    examples = {split: tokenize(task, split, tokenizer, longest) for split in task.splits}
    meter, collate = FlopMeter(model, reference), Collator(tokenizer)
    spending = None
    if spec.budget is not None:
        with waiting("pricing full fine-tuning"):
            full = _full_flops(spec, reference, examples["train"], collate)
            spending = Spending(meter, parse_budget(spec.budget), full=full)
    _check_guidance(model, config, spending)
    surveyed = None
    if spending is not None and method.surveyed is not None and config.frozen_below == 0:
        with waiting("surveying the model"):
            device = next(model.parameters()).device
            batches = survey_batches(examples["train"], collate, device, spec.seed)
            allowance = SURVEY_SHARE * spending.flops_limit
            surveyed = charged_survey(model, meter, batches, allowance)
        config = replace(config, frozen_below=surveyed.frozen_below())
    recipe = Recipe(method.lr, STANDARD_BATCH)
    if spending is not None and method.surveyed is not None:
        shallow = config.frozen_below > 1
        recipe = method.surveyed.shallow if shallow else method.surveyed.deep
    lr = recipe.lr if spec.lr is None else spec.lr
    batch_size = spec.batch_size or recipe.batch_size
    return Prepared(
        task, tokenizer, model, method, config, lr, meter, examples, batch_size, spending, surveyed
    )


def _full_flops(spec: RunSpec, costs: CostModel, rows: Sequence[Example], collate: Collator) -> int:
    """What full fine-tuning on these rows would cost."""
    lengths = [len(row["input_ids"]) for row in rows]
    size = spec.batch_size or STANDARD_BATCH
    shapes = batch_shapes(lengths, batch_size=size, epochs=spec.epochs, seed=spec.seed)
    longest = dict(max(rows, key=lambda row: len(row["input_ids"])))
    return full_fine_tuning_flops(costs, shapes, longest, collate)


def _check_guidance(model: nn.Module, config: Config, spending: Spending | None) -> None:
    """Say now, not after the start, what the guide cannot use."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0)
    trial = replace(config, total_steps=config.total_steps or sys.maxsize)
    Guide(model, optimizer, trial, probe=lambda count: (), spending=spending).close()


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA pairs on all linear layers but the head, which trains in full (Hu et al. 2022)."""
    from peft import LoraConfig, TaskType, get_peft_model  # noqa: PLC0415 - slow to import

    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a renamed attribute
        adapted: nn.Module = get_peft_model(model, settings)
    return adapted
