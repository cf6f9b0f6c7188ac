"""Whether maps, and what guidance gains, go with what tasks are like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rgft.bench.comparisons import OURS
from rgft.bench.maps.agreement import RESAMPLES, rank_correlation
from rgft.bench.maps.run_maps import RunMap, run_maps
from rgft.bench.results import REFERENCE, Problem, Result, shown
from rgft.bench.statistics import holm
from rgft.bench.table import Table
from rgft.tasks import TASKS

LEAST_TASKS = 5  # of four tasks no order is rarer than one in 24, two-sided one in 12
TRAITS = ("rows", "classes", "distance")
OUTCOMES = ("centre", "gain")
NAMES = {"centre": "centre of the map", "gain": f"{OURS} less {REFERENCE}"}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a task is like, and what became of it; NaN where something is not known.

    Attributes:
        rows: Training rows.
        classes: Classes of its labels.
        distance: From pre-training: the share of the labels' variance that no layer of the
            pre-trained model explains, by the surveys of runs with a budget.
        centre: Of the map at the end of full fine-tuning, from 0 (only embeddings have error) to 1
            (only the head has): the mean of relative depths, weighed by E.
        gain: Points that `rgft` at its largest budget is above full fine-tuning at its largest.
    """

    rows: float
    classes: float
    distance: float
    centre: float
    gain: float


def centre(one: RunMap) -> float:
    r"""Where the error is, in depth.

    $$ c = \frac{\sum_k E_k d_k}{d_{max} \sum_k E_k} $$
    """
    total = sum(one.end.values())
    deepest = max(one.depths.values())
    if not total or not deepest:
        return math.nan
    return sum(value * one.depths[name] for name, value in one.end.items()) / total / deepest


def traits(found: Sequence[Result]) -> dict[Problem, Traits]:
    """Of every problem."""
    told = {}
    for problem in dict.fromkeys(result.problem for result in found):
        here = [result for result in found if result.problem == problem]
        ours, full = (_at_largest_budget(here, arm) for arm in (OURS, REFERENCE))
        maps = [] if full is None else run_maps([full])
        entry = TASKS.get(problem.task)
        surveys = [run["survey"] for r in here for run in r.runs.values() if run.get("survey")]
        told[problem] = Traits(
            rows=float(problem.rows),
            classes=float((entry and entry.classes) or math.nan),
            distance=_mean([1 - max(survey["explained"]) for survey in surveys]),
            centre=_mean([centre(one) for one in maps]),
            gain=math.nan if ours is None or full is None else 100 * (ours.mean - full.mean),
        )
    return told


def of_traits(found: Sequence[Result]) -> Table:
    """What each task is like; nothing of one alone."""
    rows = [
        [shown(problem, found), f"{one.rows:.0f}", _told(one.classes, ".0f"),
         _told(one.distance, ".2f"), _told(one.centre, ".2f"), _told(one.gain, "+.1f")]
        for problem, one in traits(found).items()
        if not (math.isnan(one.centre) and math.isnan(one.gain))
    ]  # fmt: skip
    caption = (
        "Distance: the share of the labels' variance that no layer of the pre-trained model "
        f"explains. Centre of the map: mean relative depth, weighed by E, at the end of "
        f"{REFERENCE} (0: all error in the embeddings; 1: all in the head). {OURS} less "
        f"{REFERENCE}: points, each at its largest budget."
    )
    header = ["task", "rows", "classes", "distance", *(NAMES[name] for name in OUTCOMES)]
    return Table("Error maps: traits of tasks", caption, header, rows if len(rows) > 1 else [])


def with_traits(found: Sequence[Result]) -> Table:
    """What goes with what, over tasks."""
    every = list(traits(found).values())
    pairs = [(outcome, trait) for outcome in OUTCOMES for trait in TRAITS] + [("gain", "centre")]
    named, told = [], []
    for outcome, trait in pairs:
        both = [(getattr(one, outcome), getattr(one, trait)) for one in every]
        values = np.array([pair for pair in both if not any(map(math.isnan, pair))]).T
        if values.size and values.shape[1] >= LEAST_TASKS and all(np.ptp(values, axis=1) > 0):
            named.append([NAMES[outcome], NAMES.get(trait, trait)])
            told.append(_related(values[0], values[1]))
    adjusted = holm([p for *_, p in told])
    rows = [
        [*names, f"{value:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.2g}", str(count)]
        for names, (value, low, high, count, _), p in zip(named, told, adjusted, strict=True)
    ]
    caption = (
        "Rank correlation (Spearman) over tasks, its range when one of them is left out, and the p "
        "of the permutation test, corrected by Holm over the table."
    )
    header = ["", "with", "rank correlation", "without one task", "p", "tasks"]
    return Table("Error maps: what goes with traits", caption, header, rows)


def _related(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, int, float]:
    """Rank correlation, its least and most without one, how many there are, and p (two-sided)."""
    without = [float(rank_correlation(np.delete(x, i), np.delete(y, i))) for i in range(len(x))]
    p = stats.permutation_test(
        (x,),
        lambda drawn: rank_correlation(drawn, y),
        permutation_type="pairings",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).pvalue
    return float(rank_correlation(x, y)), min(without), max(without), len(x), float(p)


def _at_largest_budget(found: Sequence[Result], arm: str) -> Result | None:
    """The arm at the largest of its budgets that are shares."""
    here = [r for r in found if r.arm == arm and not isinstance(r.budget, str)]
    return max(here, key=lambda result: float(result.budget), default=None)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _told(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
