"""From what to run to a model, data and settings that are ready to train."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from torch import Tensor, nn
from transformers import set_seed

from rgft.adapters import Adapter
from rgft.adapters.allocation import check_allocation
from rgft.attention_kernels import attention_kernels
from rgft.batch_share import check_divides
from rgft.batches import Example
from rgft.config import Config
from rgft.costs import CostModel, FlopMeter
from rgft.errors import InputError
from rgft.execution.galore import Projection, check_rank, projected_weights
from rgft.execution.stored_samples import Storage
from rgft.forgetting import Untaught, load_ability
from rgft.guide import Guide
from rgft.inputs import Inputs, load_inputs
from rgft.launch import Launch
from rgft.methods import Method, find_method
from rgft.progress import waiting
from rgft.run_cache import prefix_cache_format
from rgft.run_samples import check_skipping, load_data, sampling
from rgft.run_start import begin, own_rate, priced
from rgft.run_trainer import Sampling
from rgft.settings import method_config
from rgft.spec import RunSpec
from rgft.spending import Spending
from rgft.structure.architecture import outline
from rgft.structure.cutting import count_layers, keep_layers
from rgft.structure.dropout import turn_off_dropout
from rgft.survey import Survey
from rgft.tasks import TaskData


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
    projection: Projection | None
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
    untaught: Untaught | None  # in the first process, where forgetting is measured
    spending: Spending | None = None
    survey: Survey | None = None
    few: bool = False  # visits, so that the upper half trains
    seconds: float = 0.0  # of the checks, the price of full fine-tuning and the survey
    processor: float = 0.0  # the same, over all threads

    @property
    def auto(self) -> bool:
        """Whether the run finds its own budget."""
        return self.spending is not None and self.spending.budget.auto

    @property
    def stem(self) -> str:
        """What lies below the layers."""
        return next((part.name for part in outline(self.model) if part.depth == 0), "embeddings")

    @property
    def start(self) -> str | None:
        """What the survey found and what was chosen by it, in a sentence; None without one."""
        if self.survey is None:
            return None
        frozen = sum(depth < self.config.frozen_below for depth in self.survey.depths)
        lowest = f" and the lowest {frozen} of them" if frozen else ""
        why = ", since the budget buys few visits" if self.few else ""
        return (
            f"{self.survey.told()}; {self.layers.kept} of {self.layers.of} layers kept, "
            f"{self.stem}{lowest} frozen{why}; learning rate {self.lr:.2g}, batches "
            f"of {self.batch_size}"
        )

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


class Loaded(NamedTuple):
    """What a run is about, before anything is chosen."""

    task: TaskData
    inputs: Inputs
    model: nn.Module
    reference: CostModel  # of the model that full fine-tuning would train
    layers: int  # it has, or had
    untaught: Untaught | None


def prepare(spec: RunSpec, launch: Launch, until_end: ExitStack) -> Prepared:
    """Load what `spec` names, and check that it goes together.

    Args:
        spec: What to run.
        launch: The processes that run it.
        until_end: Left when the run ends: what is set for all of it.

    Raises:
        InputError: It does not, or something cannot be loaded.
    """
    method = find_method(spec.method)
    config, adapter, value, projection = method_config(spec, method)
    check_skipping(spec, method)
    _check_alone(spec, method, adapter, launch)
    loaded = _load(spec, config, adapter, value, asked=bool(spec.forgetting) and launch.first)
    task, inputs, model, reference, layers, untaught = loaded
    examples = {split: inputs.examples(task, split) for split in task.splits}
    rows = examples["train"]
    tokens = max(inputs.lengths(inputs.longest(rows))) if task.modality == "text" else None
    until_end.enter_context(attention_kernels(spec.precision, tokens))
    meter = FlopMeter(model, reference)
    started, started_processor = time.perf_counter(), time.process_time()
    spending = priced(spec, task, meter=meter, costs=reference, rows=rows, inputs=inputs)
    _check_guidance(model, config, spending, meter)
    if projection is not None:
        check_rank(projected_weights(model), projection.rank)
    begun = begin(spec, task, method, config=config, spending=spending, rows=rows, inputs=inputs)
    config, recipe = begun.config, begun.recipe
    dropout = recipe.dropout if spec.dropout is None else spec.dropout
    if not dropout and turn_off_dropout(model) == 0 and spec.dropout is not None:
        raise InputError("--no-dropout has no effect: this model has no dropout; leave it out")
    seconds = time.perf_counter() - started
    processor = time.process_time() - started_processor
    batch_size = spec.batch_size or recipe.batch_size
    check_divides(batch_size, launch.size)
    how = sampling(
        spec, task, method, rows=rows, inputs=inputs, batch_size=batch_size, spending=spending
    )
    cache = prefix_cache_format(
        *(spec, method, model, config),
        spending=spending,
        batch=lambda: inputs.collate(rows[:batch_size]),
        launch=launch,
    )
    return Prepared(
        task=task,
        fingerprint=task.fingerprint(),
        inputs=inputs,
        model=model,
        adapter=adapter,
        projection=projection,
        config=config,
        lr=own_rate(recipe, method, model) if spec.lr is None else spec.lr,
        meter=meter,
        examples=examples,
        batch_size=batch_size,
        dropout=dropout,
        adam_beta2=recipe.adam_beta2 if spec.adam_beta2 is None else spec.adam_beta2,
        sampling=how,
        prefix_cache=cache,
        untaught=untaught,
        spending=spending,
        survey=begun.survey,
        few=begun.few,
        seconds=seconds,
        processor=processor,
        layers=Layers(count_layers(model), layers),
    )


def _load(
    spec: RunSpec, config: Config, adapter: Adapter | None, value: int | None, *, asked: bool
) -> Loaded:
    """The data and the model, with as many layers as were asked for, and the adapter.

    If it is `asked`, what the model can do is measured before anything is done to it.
    """
    with waiting("loading the data"):
        task = load_data(spec)
    with waiting(f"loading the processor of {escape(spec.model)}"):
        inputs = load_inputs(spec, task)
        ability = load_ability(spec, task, inputs) if asked else None
    set_seed(spec.seed)
    with waiting(f"loading the model {escape(spec.model)}"):
        model = inputs.load_model(task.label_names)
    untaught = None
    if ability is not None:
        with waiting("measuring what the model can do untaught"), on_accelerator(model):
            untaught = Untaught(ability, ability.measure(model))
    with waiting("setting up the method"):
        reference, layers = CostModel(model), count_layers(model)
        if spec.keep_layers is not None:
            keep_layers(model, spec.keep_layers)
        if adapter is not None:
            assert value is not None
            model = adapter.add(model, value)
            if adapter.allocates:
                check_allocation(config, spec.budget)
    return Loaded(task, inputs, model, reference, layers, untaught)


@contextmanager
def on_accelerator(model: nn.Module) -> Iterator[None]:
    """Where there is one; the model is back where it was afterwards."""
    place, there = next(model.parameters()).device, torch.accelerator.current_accelerator()
    model.to(there or place)
    try:
        yield
    finally:
        model.to(place)


def _check_alone(spec: RunSpec, method: Method, adapter: Adapter | None, launch: Launch) -> None:
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


def _check_guidance(
    model: nn.Module, config: Config, spending: Spending | None, meter: FlopMeter
) -> None:
    """Say now, not after the start, what the guide cannot use."""
    depths = [part.depth for part in outline(model) if part.module is not None]
    if depths and config.frozen_below > max(depths):
        raise InputError(
            f"frozen_below is {config.frozen_below}, and the last layer of this model has depth "
            f"{max(depths)}: no layer would train; give at most that, or --method linear-probing"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0)
    trial = replace(config, total_steps=config.total_steps or sys.maxsize)
    Guide(model, optimizer, trial, probe=lambda count: (), spending=spending, meter=meter).close()
