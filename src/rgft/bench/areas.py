"""How much quality an arm has for how little, over all that it was run at: area under the curve."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rgft.bench.results import Result, clock, judged_on, shown
from rgft.bench.statistics import area_under
from rgft.bench.table import Table, budget_order, budget_text, spread_text


def areas(found: Sequence[Result]) -> Table:
    """Area under quality over FLOPs, and over seconds, of every arm on every problem."""
    rows = []
    for problem in dict.fromkeys(result.problem for result in found):
        here = [result for result in found if result.problem == problem]
        costs = ("flops", clock(here))
        limits = [max(getattr(result, cost) for result in here) for cost in costs]
        told = []
        for arm in dict.fromkeys(result.arm for result in here):
            own = [result for result in here if result.arm == arm]
            values = [area(own, cost, limit) for cost, limit in zip(costs, limits, strict=True)]
            budgets = sorted({result.budget for result in own}, key=budget_order)
            told.append(
                (values, [shown(problem, found), arm, ", ".join(map(budget_text, budgets))])
            )
        told.sort(key=lambda row: -_mean(row[0][0]))
        rows += [[*names, *map(spread_text, values)] for values, names in told]
    caption = (
        "Mean, over budgets from nothing to the dearest run of the task, of the best headline "
        f"metric x 100 ({judged_on(found)}) that an arm was run to for at most that much; 0 before "
        "its cheapest run, and a dash for an arm that has the dearest alone. Mean ± standard "
        "deviation over the seeds that it has at all its budgets. It rewards small budgets that "
        "were run: compare arms with the same ones."
    )
    header = ["task", "arm", "budgets", "over FLOPs", "over seconds"]
    several = {(row[0], row[1]) for row in rows if ", " in row[2]}
    return Table("Area under quality over cost", caption, header, rows if several else [])


def area(own: Sequence[Result], cost: str, limit: float) -> list[float]:
    """One arm's area on one problem by seed, in points; none if it has the dearest run alone."""
    if min(getattr(result, cost) for result in own) >= limit:
        return []
    scores = [result.scores() for result in own]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in scores)))
    return [
        100
        * area_under([(getattr(r, cost), s[seed]) for r, s in zip(own, scores, strict=True)], limit)
        for seed in seeds
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
