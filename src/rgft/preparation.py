"""From what to run to a model, data and settings that are ready to train."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from torch import Tensor, nn
from transformers import set_seed

from rgft.adapters import Adapter
from rgft.adapters.allocation import check_allocation
from rgft.batch_share import check_divides
from rgft.batches import Example
from rgft.budgeting import (
    STANDARD_BATCH,
    batch_shapes,
    full_fine_tuning_flops,
    step_share,
    surveyed_start,
    task_yardstick,
)
from rgft.config import Config
from rgft.costs import CostModel, FlopMeter
from rgft.errors import InputError
from rgft.execution.stored_samples import Storage
from rgft.guide import Guide
from rgft.inputs import Inputs, load_inputs
from rgft.launch import Launch
from rgft.loss_percentiles import LossPercentiles
from rgft.methods import Method, Recipe, find_method
from rgft.opening import frozen_share
from rgft.policies import find_policy
from rgft.progress import waiting
from rgft.rate_scale import rate_scale
from rgft.residuals import Ledger
from rgft.run_trainer import Sampling
from rgft.sampling import class_weights
from rgft.settings import method_config
from rgft.spec import RunSpec, without_budget
from rgft.spending import Spending, parse_budget
from rgft.structure.cutting import count_layers, keep_layers
from rgft.structure.dropout import turn_off_dropout
from rgft.survey import Survey
from rgft.tasks import TaskData, load_folder, load_pairs, load_task
from rgft.tasks.splitting import fewer_evaluation_rows, fewer_train_rows
from rgft.text_trainer import WRITTEN_ROWS
from rgft.visits import VisitSampler

BUCKET = 16  # batches whose texts are sorted by length among each other
MOST_VISITS = 4  # epochs a budget may buy for each epoch of full fine-tuning
OFF = "off"
DEPTH_OF_LAYERS = 1  # of the first: everything but the embeddings trains
BALANCED = ("matthews_correlation", "f1_macro")  # metrics in which every class counts alike
BALANCE = 0.5
FULL_PASS = 0.125  # of the run, at its end, where a method skips samples (Qin et al. 2024)


class Layers(NamedTuple):
    """How many layers of a model are kept, of how many."""

    kept: int
    of: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run, ready to start."""

    task: TaskData
    fingerprint: str
    inputs: Inputs
    model: nn.Module
    adapter: Adapter | None
    config: Config
    lr: float
    meter: FlopMeter
    examples: dict[str, list[Example]]
    batch_size: int
    adam_beta2: float
    dropout: bool
    layers: Layers
    sampling: Sampling
    prefix_cache: str | None
    spending: Spending | None = None
    survey: Survey | None = None
    seconds: float = 0.0

    @property
    def auto(self) -> bool:
        """Whether the run finds its own budget."""
        return self.spending is not None and self.spending.budget.auto

    def storage(self, folder: Path) -> Storage | None:
        """Where the prefix cache keeps what it has, if there is one."""
        if self.prefix_cache is None:
            return None
        return Storage(folder, self.prefix_cache, data=self.fingerprint)

    def sample_losses(self, count: int) -> Iterator[Tensor]:
        """Losses of the first training samples one by one, for the signals that need them.

        They count as spent, and not as batches that full fine-tuning would run.
        """
        meter, device = self.meter, next(self.model.parameters()).device
        for example in self.examples["train"][:count]:
            batch = {k: v.to(device) for k, v in self.inputs.collate([example]).items()}
            with meter.probing(alike=True):
                loss = self.model(**batch).loss
            yield loss


def load_data(spec: RunSpec) -> TaskData:
    """The task or the user's own data, with as many rows as were asked for."""
    task = _load_data(spec)
    if spec.max_train_rows is not None:
        task = fewer_train_rows(task, spec.max_train_rows)
    if spec.max_evaluation_rows is not None:
        task = fewer_evaluation_rows(task, spec.max_evaluation_rows)
    return task


def _load_data(spec: RunSpec) -> TaskData:
    """The task or the user's own data, whole."""
    folder = None if spec.data is None else Path(spec.data)
    if spec.task is not None:
        if spec.text_columns or spec.label_column or spec.target_column:
            raise InputError(
                "--text-columns, --label-column and --target-column go with --data alone, not with "
                "--task"
            )
        return load_task(spec.task, folder)
    assert folder is not None
    if spec.target_column is not None:
        return load_pairs(folder, spec.target_column, spec.text_columns)
    return load_folder(folder, spec.text_columns, spec.label_column)


def prepare(spec: RunSpec, launch: Launch) -> Prepared:
    """Load what `spec` names, and check that it goes together.

    Args:
        spec: What to run.
        launch: The processes that run it.

    Raises:
        InputError: It does not, or something cannot be loaded.
    """
    method = find_method(spec.method)
    config, adapter, value = method_config(spec, method)
    check_skipping(spec, method)
    check_alone(spec, method, adapter, launch)
    with waiting("loading the data"):
        task = load_data(spec)
    with waiting(f"loading the processor of {escape(spec.model)}"):
        inputs = load_inputs(spec, task)
    set_seed(spec.seed)
    with waiting(f"loading the model {escape(spec.model)}"):
        model = inputs.load_model(task.label_names)
    with waiting("setting up the method"):
        reference, of = CostModel(model), count_layers(model)
        if spec.keep_layers is not None:
            keep_layers(model, spec.keep_layers)
        if adapter is not None:
            assert value is not None
            model = adapter.add(model, value)
            if adapter.allocates:
                check_allocation(config, spec.budget)
    examples = {split: inputs.examples(task, split) for split in task.splits}
    meter = FlopMeter(model, reference)
    started = time.perf_counter()
    spending = _spending(
        spec, task, meter=meter, costs=reference, rows=examples["train"], inputs=inputs
    )
    _check_guidance(model, config, spending, meter)
    surveyed, config, recipe = _begin(
        spec, task, method, config=config, spending=spending, rows=examples["train"], inputs=inputs
    )
    dropout = recipe.dropout if spec.dropout is None else spec.dropout
    if not dropout and turn_off_dropout(model) == 0 and spec.dropout is not None:
        raise InputError("--no-dropout has no effect: this model has no dropout; leave it out")
    seconds = time.perf_counter() - started
    lr = _own_rate(recipe, method, model) if spec.lr is None else spec.lr
    batch_size = spec.batch_size or recipe.batch_size
    check_divides(batch_size, launch.size)
    ledger = Ledger(len(examples["train"]))
    visits = None
    if spending is not None:
        lengths = [sum(inputs.lengths(row)) for row in examples["train"]]
        visits = _visits(spec, method, ledger, lengths, batch_size, spending)
    cache = _prefix_cache(
        spec,
        method,
        model,
        config,
        spending,
        lambda: inputs.collate(examples["train"][:batch_size]),
    )
    cache = in_one_process(cache, spec, launch)
    return Prepared(
        task=task,
        fingerprint=task.fingerprint(),
        inputs=inputs,
        model=model,
        adapter=adapter,
        config=config,
        lr=lr,
        meter=meter,
        examples=examples,
        batch_size=batch_size,
        dropout=dropout,
        adam_beta2=recipe.adam_beta2 if spec.adam_beta2 is None else spec.adam_beta2,
        sampling=Sampling(
            ledger,
            visits,
            _balance(spec, task, method, examples["train"]),
            None
            if method.percentile_power is None
            else LossPercentiles(method.percentile_power, spec.seed),
        ),
        prefix_cache=cache,
        spending=spending,
        survey=surveyed,
        seconds=seconds,
        layers=Layers(count_layers(model), of),
    )


def _own_rate(recipe: Recipe, method: Method, model: nn.Module) -> float:
    """The learning rate of a recipe; what adapters add is not of the model's width."""
    return recipe.lr if method.adapter else recipe.lr * rate_scale(model)


def _begin(  # noqa: PLR0913 - what the choice is made from
    spec: RunSpec,
    task: TaskData,
    method: Method,
    *,
    config: Config,
    spending: Spending | None,
    rows: Sequence[Example],
    inputs: Inputs,
) -> tuple[Survey | None, Config, Recipe]:
    """What a survey finds, if there is one; settings and recipe after that."""
    recipes = method.surveyed
    if spending is None or recipes is None:
        return None, config, Recipe(method.lr, STANDARD_BATCH)
    if task.kind == "generation":  # there are no labels that a layer could know
        below = config.frozen_below or DEPTH_OF_LAYERS
        return None, replace(config, frozen_below=below), recipes.deep
    if config.frozen_below:
        share = frozen_share(spending.meter.model, config.frozen_below)
        return None, config, recipes.known(share)
    with waiting("surveying the model"):
        start = surveyed_start(
            spending, config, recipes, rows, inputs, seed=spec.seed, cut=spec.keep_layers is None
        )
    return start.survey, replace(config, frozen_below=start.frozen_below), start.recipe


def _spending(  # noqa: PLR0913 - what it is made of
    spec: RunSpec,
    task: TaskData,
    *,
    meter: FlopMeter,
    costs: CostModel,
    rows: Sequence[Example],
    inputs: Inputs,
) -> Spending | None:
    """What a run may spend; None without a budget."""
    if spec.budget is None:
        return None
    shapes = batch_shapes(
        [inputs.lengths(row) for row in rows],
        inputs.multiple,
        batch_size=STANDARD_BATCH,
        epochs=spec.epochs,
        seed=spec.seed,
    )
    with waiting("pricing full fine-tuning"):
        full = full_fine_tuning_flops(costs, shapes, inputs.longest(rows), inputs)
    budget = parse_budget(spec.budget)
    yardstick = task_yardstick(task, spec.written_rows or WRITTEN_ROWS) if budget.auto else None
    return Spending(meter, budget, full=full, yardstick=yardstick)


def _visits(  # noqa: PLR0913, PLR0917 - what it is made of
    spec: RunSpec,
    method: Method,
    ledger: Ledger,
    lengths: Sequence[int],
    batch_size: int,
    spending: Spending,
) -> VisitSampler:
    """The samples of a run that ends with its budget."""
    grouped = spec.group_by_length
    if grouped is None:
        grouped = method.surveyed is not None
    epochs = math.ceil(spec.epochs * MOST_VISITS)
    return VisitSampler(
        ledger,
        batch_size=batch_size,
        epochs=epochs,
        skip=method.skip if spec.skip is None else spec.skip,
        full_pass=FULL_PASS if method.skip else 0.0,
        over=lambda: spending.stage_progress,
        lengths=lengths if grouped else None,
        bucket=BUCKET,
        seed=spec.seed,
    )


def _balance(
    spec: RunSpec, task: TaskData, method: Method, rows: Sequence[Example]
) -> Tensor | None:
    """Weights of the classes; None for all alike.

    Raises:
        InputError: They are asked for, and there are no classes.
    """
    exponent = spec.balance
    if exponent is None and spec.budget is not None and method.surveyed is not None:
        exponent = BALANCE if task.metric in BALANCED else 0.0
    if not exponent:
        return None
    if task.kind != "classification":
        what = "numbers" if task.kind == "regression" else "texts"
        raise InputError(f"balance is {exponent}, but the labels are {what}, not classes; drop it")
    return class_weights(torch.tensor([row["labels"] for row in rows]), exponent)


def _prefix_cache(  # noqa: PLR0913, PLR0917 - what it depends on
    spec: RunSpec,
    method: Method,
    model: nn.Module,
    config: Config,
    spending: Spending | None,
    batch: Callable[[], dict[str, Tensor]],
) -> str | None:
    """Format of the prefix cache; None for none.

    Raises:
        InputError: One is asked for, and nothing is ever frozen, or batches have to run whole.
    """
    if spec.prefix_cache == OFF:
        return None
    why, config_of = "", getattr(model, "config", None)
    if method.percentile_power is not None:
        why = f"the method '{spec.method}' runs batches whole to choose from them"
    elif getattr(config_of, "is_encoder_decoder", False):
        why = f"'{spec.model}' has an encoder and a decoder, and what goes from one to the other is"
        why += " not kept"
    if why and spec.prefix_cache is not None:
        raise InputError(f"prefix_cache is {spec.prefix_cache!r}, but {why}; drop it")
    if why:
        return None
    fixed = config.frozen_below > 1
    if spec.prefix_cache is not None:
        if not fixed and not find_policy(config).freezes:
            raise InputError(
                f"prefix_cache is {spec.prefix_cache!r}, but the method '{spec.method}' freezes no "
                "layer: drop it, or freeze some with --set frozen_below=N"
            )
        return spec.prefix_cache
    if not fixed or spending is None:
        return None
    share = spending.budget.share
    # without a second visit there is nothing to find
    if share and share * spec.epochs <= step_share(model, config, spending.meter, batch()):
        return None
    return "float32"


def check_skipping(spec: RunSpec, method: Method) -> None:
    """Refuse to leave samples out where it has no effect, or a wrong one.

    Raises:
        InputError: It is so.
    """
    if method.skip and spec.budget is None:
        raise without_budget(f"the method '{spec.method}' leaves samples out, which")
    if spec.skip and method.percentile_power is not None:
        raise InputError(
            f"skip is {spec.skip}, but the method '{spec.method}' chooses samples itself, from "
            "whole batches; drop it"
        )


def check_alone(spec: RunSpec, method: Method, adapter: Adapter | None, launch: Launch) -> None:
    """Refuse methods that choose by what one process sees.

    Raises:
        InputError: The method is one, and there are several processes.
    """
    allocates = adapter is not None and adapter.allocates
    if launch.size > 1 and (allocates or method.percentile_power is not None):
        what = "ranks" if allocates else "samples of a batch"
        raise InputError(
            f"the method '{spec.method}' chooses {what} by what one process sees; start rgft train "
            "in one process, or choose another method"
        )


def in_one_process(cache: str | None, spec: RunSpec, launch: Launch) -> str | None:
    """Format of the prefix cache; none, and a warning, where there are several processes.

    Raises:
        InputError: It was asked for.
    """
    if cache is None or launch.size == 1:
        return cache
    why = "prefix_cache works in one process: with several, samples come back to other ones"
    if spec.prefix_cache is not None:
        raise InputError(f"{why}; give --prefix-cache off, or start rgft train in one process")
    warnings.warn(f"{why}; the run goes without it", RuntimeWarning, stacklevel=2)
    return None


def _check_guidance(
    model: nn.Module, config: Config, spending: Spending | None, meter: FlopMeter
) -> None:
    """Say now, not after the start, what the guide cannot use."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0)
    trial = replace(config, total_steps=config.total_steps or sys.maxsize)
    Guide(model, optimizer, trial, probe=lambda count: (), spending=spending, meter=meter).close()
