"""What a run with a budget does before it starts: price full fine-tuning, survey the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rgft import metrics
from rgft.batches import Example
from rgft.components import partition
from rgft.config import Config
from rgft.costs import Action, CostModel, FlopMeter, component_costs
from rgft.errors import InputError, warn
from rgft.inputs import Inputs
from rgft.methods import Recipe, Surveyed
from rgft.opening import (
    frozen_share,
    opened_below,
    passes_bought,
    passes_wanted,
    too_few_for_all,
    upper_half,
    visit_costs,
)
from rgft.spending import Spending
from rgft.stages import Yardstick
from rgft.structure.cutting import can_cut, keep_layers
from rgft.survey import Survey, survey
from rgft.tasks import TaskData

STANDARD_BATCH = 32  # samples a step of the full fine-tuning that a budget is a share of
MOST_VISITS = 4  # epochs a budget may buy for each epoch of full fine-tuning
SURVEY_SAMPLES = 512
SURVEY_SHARE = 0.1  # most of a budget that its survey may spend
SURVEY_BATCH = 32
SURVEY_FEW = 128  # samples; of fewer, what is found changes most from draw to draw (decision 10)


Shape = tuple[int, ...]  # rows, then positions on each side


def batch_shapes(
    lengths: Sequence[Sequence[int]], multiple: int, *, batch_size: int, epochs: float, seed: int
) -> Counter[Shape]:
    """How often each batch shape occurs when samples are drawn at random, padded to the longest.

    >>> batch_shapes([[3], [9], [5], [4]], 2, batch_size=2, epochs=1.0, seed=0)
    Counter({(2, 10): 1, (2, 6): 1})
    """
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor(lengths)
    steps = math.ceil(epochs * math.ceil(len(positions) / batch_size))
    shapes: Counter[Shape] = Counter()
    while steps > 0:
        order = torch.randperm(len(positions), generator=generator)
        batches = torch.split(order, batch_size)[:steps]
        steps -= len(batches)
        for rows in batches:
            longest = positions[rows].amax(0).tolist()
            shapes[len(rows), *(-(-most // multiple) * multiple for most in longest)] += 1
    return shapes


def full_fine_tuning_flops(
    costs: CostModel, shapes: Mapping[Shape, int], longest: Example, inputs: Inputs
) -> int:
    """FLOPs of steps that train everything, on batches of these shapes.

    Args:
        costs: Of the model that full fine-tuning would train.
        shapes: How many batches of each shape there are.
        longest: A sample with as many positions as the longest batch, on each side.
        inputs: Makes batches.
    """
    total = 0
    for (rows, *positions), count in sorted(shapes.items()):
        example = inputs.cut(longest, positions)
        graph = costs.graph(**inputs.collate([example] * rows))
        total += count * costs.step(graph, Action(costs.names)).total
    return total


def survey_batches(
    examples: Sequence[Example], inputs: Inputs, device: torch.device, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Some samples in batches of like lengths, in random order."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(examples), generator=generator)[:SURVEY_SAMPLES].tolist()
    drawn.sort(key=lambda i: inputs.lengths(examples[i]))
    count = math.ceil(len(drawn) / SURVEY_BATCH)
    for i in torch.randperm(count, generator=generator).tolist():
        rows = drawn[i * SURVEY_BATCH : (i + 1) * SURVEY_BATCH]
        yield {k: v.to(device) for k, v in inputs.collate([examples[j] for j in rows]).items()}


def charged_survey(
    model: nn.Module, meter: FlopMeter, batches: Iterable[dict[str, Tensor]], allowance: float
) -> Survey:
    """Survey the model; what that costs is spent, and ends when it exceeds `allowance` FLOPs."""
    start = meter.spent
    affordable = takewhile(lambda _: meter.spent - start < allowance, batches)
    with meter.charging():
        return survey(model, affordable)


def typical_batch(
    examples: Sequence[Example], inputs: Inputs, batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    """A batch whose samples, which have one side, are as long as `examples` are on average."""
    total = sum(inputs.lengths(example)[0] for example in examples)
    example = inputs.cut(inputs.longest(examples), [round(total / len(examples))])
    return {k: v.to(device) for k, v in inputs.collate([example] * batch_size).items()}


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        config: Settings of the guide.
        recipe: Learning rate and batches.
        survey: What the layers know of the labels, if they were asked.
        few: Whether part of them is frozen since the budget buys too few visits to train all.
    """

    config: Config
    recipe: Recipe
    survey: Survey | None = None
    few: bool = False


def surveyed_start(  # noqa: PLR0913 - what the choice is made from
    spending: Spending,
    config: Config,
    recipes: Surveyed,
    examples: Sequence[Example],
    inputs: Inputs,
    *,
    seed: int,
    cut: bool,
    most_passes: float,
) -> Start:
    """Survey the model, drop its last layers if `cut`, and choose how deep training reaches."""
    meter, model = spending.meter, spending.meter.model
    device = next(model.parameters()).device
    batches = survey_batches(examples, inputs, device, seed)
    surveyed = charged_survey(model, meter, batches, SURVEY_SHARE * spending.flops_limit)
    if surveyed.samples < SURVEY_FEW:
        warn(
            f"the survey saw {surveyed.samples} samples; of fewer than {SURVEY_FEW} it is partly "
            "chance which layers it chooses to train and keep: give a larger --budget or more "
            "data, or choose by --keep-layers and --set frozen_below"
        )
    known = surveyed.known()
    priced = spending.budget.share is not None  # what a time buys is not known
    batch = typical_batch(examples, inputs, recipes.shallow.batch_size, device) if priced else {}
    lowest, half = min(surveyed.depths), upper_half(surveyed.depths)
    if priced and not known and half > lowest:
        whole = (spending.limit - meter.spent) / len(examples)  # of `auto`, all of its stages
        passes = passes_bought(whole, *visit_costs(meter, config, batch, lowest))
        if too_few_for_all(len(examples), passes):
            recipe = recipes.between(frozen_share(model, half))
            return Start(replace(config, frozen_below=half), recipe, surveyed, few=True)
    kept = len(surveyed.depths)
    if cut and can_cut(model):
        kept = surveyed.layers()
        keep_layers(model, kept)
        meter.renew()
    depth = surveyed.frozen_below(kept)
    if not known:
        return Start(replace(config, frozen_below=depth), recipes.deep, surveyed)
    if priced:
        limit = (spending.flops_limit - meter.spent) / len(examples)
        passes = passes_wanted(len(examples), most_passes)
        depths = range(lowest, depth + 1)
        depth = opened_below(depths, meter, config, batch, limit=limit, passes=passes)
    recipe = recipes.between(frozen_share(model, depth))
    return Start(replace(config, frozen_below=depth), recipe, surveyed)


def step_share(
    model: nn.Module, config: Config, meter: FlopMeter, batch: dict[str, Tensor]
) -> float:
    """Cost of a step that trains all that is not frozen for good, relative to a full one."""
    components = partition(model, config.granularity)
    graph = meter.costs.graph(**batch)
    costs = component_costs([graph], components)
    kept = [
        i
        for i, component in enumerate(components)
        if config.may_train(component.kind, component.depth)
    ]
    return costs.cost(kept) / costs.full


def task_yardstick(task: TaskData, rows: int | None = None) -> Yardstick:
    """What the stages of a run on `task` are judged by: its metric on the validation split.

    Args:
        task: The task.
        rows: Most rows of the split that texts are written for, where that is the task.

    Raises:
        InputError: The split cannot tell one model from another.
    """
    labels = task.splits["validation"][task.label_column][:]
    if task.kind != "generation" and len(set(labels)) < 2:
        raise InputError(
            f"the validation split has {len(set(labels))} different labels, so that --budget auto "
            "cannot see what compute buys; give a validation split with 2 or more, or a budget "
            "such as 0.3"
        )
    judged = len(labels)
    if task.kind == "generation":
        judged = min(judged, rows or judged)
    return Yardstick(task.metric, judged, metrics.chance(task.kind, task.metric, labels))
