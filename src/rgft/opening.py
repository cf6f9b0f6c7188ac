r"""How deep training reaches: as deep as the budget pays for, where depth is not needed.

A survey says above which depth training is enough. What is left of a budget then buys visits, and
visits beyond a few for each sample buy little: the model learns its training data by heart. Such a
budget is better spent on deeper layers. With :math:`f_d` the FLOPs of a sample's first visit when
everything from depth d on trains, and :math:`a_d` those of a later one, whose frozen layers need
not run again, a budget of C buys

.. math:: n_d = \begin{cases} C / (N f_d) & C \le N f_d \\
    1 + (C - N f_d) / (N a_d) & \text{else} \end{cases}

passes over N samples. The smallest d with :math:`n_d` at least `PASSES` is chosen, and at most the
depth that the survey names. With few samples so many passes are too few steps to train deep layers
in: there have to be `VISITS` visits, too.

Where no layer knows the labels, they have to be made, and every layer trains for it, in many small
steps. If the budget buys fewer than `VISITS_OF_ALL` visits so, the upper half trains, at a larger
rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from rgft.components import partition
from rgft.config import Config
from rgft.costs import Action, FlopMeter
from rgft.structure.architecture import outline

PASSES = 1.5  # what is left of a budget after so many passes over the data goes into depth
VISITS = 2000  # and after so many visits of samples
VISITS_OF_ALL = 3500  # of fewer, the upper half learns more than all layers that know nothing yet


def opened_below(  # noqa: PLR0913 - all but one are what the rule is about
    depths: Sequence[int],
    meter: FlopMeter,
    config: Config,
    batch: Mapping[str, Tensor],
    *,
    limit: float,
    passes: float,
) -> int:
    """Depth of the first component that should train.

    Args:
        depths: What to choose from, in increasing order. The last needs nothing below it trained.
        meter: Of the model that trains.
        config: Settings of the guide.
        batch: A typical one.
        limit: FLOPs that may be spent for each sample of the training data.
        passes: How often each sample should be visited before compute is spent on depth; see
            `passes_wanted`.
    """
    for depth in depths[:-1]:
        first, again = visit_costs(meter, config, batch, depth)
        if passes_bought(limit, first, again) >= passes:
            return depth
    return depths[-1]


def passes_wanted(rows: int, most: float) -> float:
    """How often each of so many samples should be visited before compute is spent on depth.

    Args:
        rows: How many samples there are.
        most: Passes over them that a run makes at most.

    >>> passes_wanted(500, 12), passes_wanted(10_000, 12), passes_wanted(100, 12)
    (4.0, 1.5, 12)
    """
    return min(max(PASSES, VISITS / rows), most)


def too_few_for_all(rows: int, passes: float) -> bool:
    """Whether so many passes over so many samples are too few visits to train every layer.

    It is about labels that no layer knows.

    >>> too_few_for_all(1000, 3.4), too_few_for_all(1000, 3.5)
    (True, False)
    """
    return rows * passes < VISITS_OF_ALL


def upper_half(depths: Sequence[int]) -> int:
    """Depth of the first of the upper half of the layers, and of the last two at least.

    >>> upper_half([1, 2, 3, 4, 5, 6]), upper_half([1, 2, 3]), upper_half([1, 2])
    (4, 2, 1)
    """
    return depths[min(len(depths) // 2, max(0, len(depths) - 2))]


def passes_bought(limit: float, first: float, again: float) -> float:
    """How often each sample is visited for a limit per sample.

    >>> passes_bought(3.0, 6.0, 2.0), passes_bought(10.0, 6.0, 2.0)
    (0.5, 3.0)
    """
    return limit / first if limit <= first else 1 + (limit - first) / again


def frozen_share(model: nn.Module, depth: int) -> float:
    """Share of the layers that stay frozen if training reaches down to `depth`.

    1.0 if only the last layer trains.
    """
    depths = [part.depth for part in outline(model) if part.module is not None]
    return min(1.0, sum(d < depth for d in depths) / max(1, len(depths) - 1))


def visit_costs(
    meter: FlopMeter, config: Config, batch: Mapping[str, Tensor], depth: int
) -> tuple[float, float]:
    """FLOPs of a sample's first visit, and of later ones, if training reaches down to `depth`."""
    opened = replace(config, frozen_below=depth)
    trained = frozenset(
        part.parameter
        for component in partition(meter.model, config.granularity)
        if opened.may_train(component.kind, component.depth)
        for part in component.slices
    )
    paths = {module: path for path, module in meter.model.named_modules()}
    frozen = frozenset(
        paths[part.module]
        for part in outline(meter.model)
        if part.module is not None and part.depth < depth
    )
    graph = meter.costs.graph(**batch)
    rows = len(next(iter(batch.values())))
    first, again = (
        meter.costs.step(graph, Action(trained, skipped=skipped)).total / rows
        for skipped in (frozenset[str](), frozen)
    )
    return first, again
