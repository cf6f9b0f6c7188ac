"""Numbers in sentences, made from records.

    <!-- = RECORDS: WHAT; TASKS; SPLIT; HOW -->+1.7<!-- / -->

RECORDS is the name of a file in benchmarks/records, or several with + between them. WHAT is

- `rgft@0.3`: the score of an arm at a budget, x 100;
- `rgft@0.3 - full@1`: how many points the first is above the second, paired by task and seed;
- `rgft@0.3 / full@1`: the seconds of the first for one of the second;
- `flops of rgft`, `seconds of rgft`: what it takes to reach the target, for one of the cheapest
  other arm;
- `perplexity of rgft@0.3`: that of an arm at a budget.

TASKS are names, or `all`; SPLIT is the name of one, or `own`: test where there is one. HOW is

- `mean`: over seeds, then tasks; `sd`: mean ± standard deviation over seeds, of one task;
- `each`: of every task, in the order named; `range`: the least and the most of them;
- `interval`: the ends of the 95% bootstrap interval over seeds within tasks.

Before HOW may stand `above` or `below`, and differences have no sign then, or `tie`. It is an error
if the records deny it (by the mean's sign, or an interval without 0): no sentence outlives them.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rgft.bench.beyond_headline import PERPLEXITY
from rgft.bench.page import load
from rgft.bench.results import Result, clock, costs_to_target, results
from rgft.bench.statistics import interval
from rgft.bench.table import budget_text, spread_text

RECORDS = Path(__file__).parent / "records"
MARK = re.compile(r"(<!-- = (.+?): (.+?); (.+?); (.+?); (.+?) -->).*?(<!-- / -->)")
OWN = "own"
ARM = re.compile(r"(\S+)@(\S+)")


class Values(NamedTuple):
    """What is told of: one value a seed, by task; and whether it is a difference, or a ratio."""

    by_task: dict[str, list[float]]
    kind: str  # "score", "difference" or "ratio"


def filled(text: str) -> str:
    """A page with every number between marks made anew.

    Raises:
        ValueError: The records do not hold what a mark asks for, or deny its verdict.
    """
    return MARK.sub(_number, text)


def _number(mark: re.Match[str]) -> str:
    records, what, tasks, split, how = mark.groups()[1:6]
    try:
        return f"{mark[1]}{told(_results(records), what, tasks, split, how)}{mark[7]}"
    except (KeyError, ValueError) as error:
        raise ValueError(f"{mark[1]}: {error}") from error


@cache
def _results(records: str) -> list[Result]:
    return results(load([RECORDS / f"{name}.jsonl" for name in records.split("+")]))


def told(found: Sequence[Result], what: str, tasks: str, split: str, how: str) -> str:
    """The number that a mark stands for."""
    names = _all(found, what) if tasks == "all" else tasks.split()
    values = _values(found, what, names, split)
    verdict, _, form = how.rpartition(" ")
    groups = list(values.by_task.values())
    if form == "sd":
        (only,) = groups
        return spread_text(only)
    numbers = _numbers(groups, form)
    _check(interval(groups) if verdict == "tie" else numbers, verdict)
    shape = {"score": ".1f", "difference": "+.1f", "ratio": ".2f"}[values.kind]
    if verdict in ("above", "below"):
        shape, numbers = ".1f", sorted(map(abs, numbers)) if form == "range" else map(abs, numbers)
    texts = [f"{number:{shape}}" for number in numbers]
    if form in ("range", "interval"):
        return " to ".join(dict.fromkeys(texts))
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _all(found: Sequence[Result], what: str) -> list[str]:
    """The tasks of what comes first, in their order in the records."""
    arms = ARM.findall(what)
    fit = [r for r in found if not arms or (r.arm, budget_text(r.budget)) == arms[0]]
    return list(dict.fromkeys(result.problem.task for result in fit))


def _values(found: Sequence[Result], what: str, tasks: Sequence[str], split: str) -> Values:
    arms = ARM.findall(what)
    if len(arms) == 1 and what.startswith(f"{PERPLEXITY} of "):
        runs = {task: _one(found, task, *arms[0]).runs.values() for task in tasks}
        return Values(
            {task: [run["metrics"][split][PERPLEXITY] for run in runs[task]] for task in tasks},
            "score",
        )
    if not arms:
        cost, arm = what.split(" of ")
        return Values({task: [_for_target(found, cost, arm, task)] for task in tasks}, "ratio")
    if len(arms) == 1:
        own = {task: _scores(found, task, *arms[0], split) for task in tasks}
        return Values({task: [100 * v for v in own[task].values()] for task in tasks}, "score")
    if " / " in what:
        return Values({task: [_seconds(found, task, *arms)] for task in tasks}, "ratio")
    by_task = {}
    for task in tasks:
        ours, theirs = (_scores(found, task, *arm, split) for arm in arms)
        by_task[task] = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    return Values(by_task, "difference")


def _one(found: Sequence[Result], task: str, arm: str, budget: str) -> Result:
    wanted = (task, arm, budget)
    fit = [r for r in found if (r.problem.task, r.arm, budget_text(r.budget)) == wanted]
    if len(fit) != 1:
        raise ValueError(f"{len(fit)} results of {arm} at {budget} on {task}")
    return fit[0]


def _scores(
    found: Sequence[Result], task: str, arm: str, budget: str, split: str
) -> dict[int, float]:
    scores = _one(found, task, arm, budget).scores(None if split == OWN else split)
    if not scores:
        raise ValueError(f"{task} has no {split} split")
    return scores


def _seconds(found: Sequence[Result], task: str, *arms: tuple[str, str]) -> float:
    ours, theirs = (_one(found, task, *arm) for arm in arms)
    name = clock([ours, theirs])
    return float(getattr(ours, name) / getattr(theirs, name))


def _for_target(found: Sequence[Result], cost: str, arm: str, task: str) -> float:
    costs = costs_to_target(found, cost)[task]
    return costs[arm] / min(value for name, value in costs.items() if name != arm)


def _check(numbers: Sequence[float], verdict: str) -> None:
    least, most = min(numbers), max(numbers)
    true = {"": True, "above": least > 0, "below": most < 0, "tie": least <= 0 <= most}
    if not true[verdict]:
        raise ValueError(f"the records do not say {verdict!r}: {least:+.2f} to {most:+.2f}")


def _numbers(groups: Sequence[Sequence[float]], form: str) -> Sequence[float]:
    means = [statistics.fmean(group) for group in groups]
    if form == "interval":
        return interval(groups)
    return {"mean": [statistics.fmean(means)], "each": means, "range": [min(means), max(means)]}[
        form
    ]
