"""What a run with a budget begins with: its price, its survey, its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rgft.batches import Example
from rgft.budgeting import (
    MOST_VISITS,
    STANDARD_BATCH,
    Start,
    batch_shapes,
    full_fine_tuning_flops,
    surveyed_start,
    task_yardstick,
)
from rgft.config import Config
from rgft.costs import CostModel, FlopMeter
from rgft.inputs import Inputs
from rgft.methods import Method, Recipe
from rgft.opening import frozen_share
from rgft.progress import waiting
from rgft.rate_scale import rate_scale
from rgft.spec import RunSpec
from rgft.spending import Spending, parse_budget
from rgft.tasks import TaskData
from rgft.text_to_text import TextToTextInputs

ABOVE_EMBEDDINGS = 1  # depth of the first layer


def priced(  # noqa: PLR0913 - what it is made of
    spec: RunSpec,
    task: TaskData,
    *,
    meter: FlopMeter,
    costs: CostModel,
    rows: Sequence[Example],
    inputs: Inputs,
) -> Spending | None:
    """What a run may spend, a share priced in FLOPs; None without a budget."""
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
    written = inputs.writing.rows if isinstance(inputs, TextToTextInputs) else None
    yardstick = task_yardstick(task, written) if budget.auto else None
    return Spending(meter, budget, full=full, yardstick=yardstick)


def begin(  # noqa: PLR0913 - what the choice is made from
    spec: RunSpec,
    task: TaskData,
    method: Method,
    *,
    config: Config,
    spending: Spending | None,
    rows: Sequence[Example],
    inputs: Inputs,
) -> Start:
    """Settings and recipe, and the survey that chose them if there is one."""
    recipes = method.surveyed
    if spending is None or recipes is None:
        return Start(config, Recipe(method.lr, STANDARD_BATCH))
    if task.kind == "generation":  # there are no labels that a layer could know
        below = config.frozen_below or ABOVE_EMBEDDINGS
        return Start(replace(config, frozen_below=below), recipes.deep)
    if config.frozen_below:
        share = frozen_share(spending.meter.model, config.frozen_below)
        return Start(config, recipes.between(share))
    with waiting("surveying the model"):
        return surveyed_start(
            *(spending, config, recipes, rows, inputs),
            seed=spec.seed,
            cut=spec.keep_layers is None,
            most_passes=spec.epochs * MOST_VISITS,
        )


def own_rate(recipe: Recipe, method: Method, model: nn.Module) -> float:
    """The learning rate of a recipe; what adapters add is not of the model's width."""
    return recipe.lr if method.adapter else recipe.lr * rate_scale(model)
