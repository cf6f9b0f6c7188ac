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

Before the HOW of a difference may stand a verdict, and it is an error if the records deny it:
`above` or `below` by the sign of the mean (of every task for `each` and `range`), written without a
sign, or `tie` by an interval that holds 0.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from rgft.bench.beyond_headline import PERPLEXITY
from rgft.bench.page import load
from rgft.bench.results import Result, clock, costs_to_target, results
from rgft.bench.statistics import interval
from rgft.bench.table import budget_text, spread_text

RECORDS = Path(__file__).parent / "records"
BEGIN = "<!-- = "
FIELD = r"([^;:>\n]+)"
MARK = re.compile(rf"({BEGIN}{FIELD}: {FIELD}; {FIELD}; {FIELD}; {FIELD} -->)[^<\n]*(<!-- / -->)")
ARM = re.compile(r"(\S+)@(\S+)")
OWN = "own"
VERDICTS = ("", "above", "below", "tie")
FORMS = ("mean", "sd", "each", "range", "interval")
SHAPES = {"score": "z.1f", "difference": "+z.1f", "ratio": ".2f"}  # z: no -0.0


class Values(NamedTuple):
    """What is told of: one value a seed, by task."""

    by_task: dict[str, list[float]]
    kind: Literal["score", "difference", "ratio"]


def filled(text: str) -> str:
    """A page with every number between marks made anew.

    Raises:
        ValueError: A mark is not one, asks for what records do not hold, or they deny its verdict.
    """
    whole, found = MARK.subn(_number, text)
    if found != text.count(BEGIN):
        raise ValueError(f"{text.count(BEGIN) - found} marks {BEGIN!r} are not as words.py says")
    return whole


def _number(mark: re.Match[str]) -> str:
    begin, records, what, tasks, split, how, end = mark.groups()
    try:
        return f"{begin}{told(_results(records), what, tasks, split, how)}{end}"
    except (KeyError, ValueError) as error:
        raise ValueError(f"{begin}: {error}") from error


@cache
def _results(records: str) -> list[Result]:
    return results(load([RECORDS / f"{name}.jsonl" for name in records.split("+")]))


def told(found: Sequence[Result], what: str, tasks: str, split: str, how: str) -> str:
    """The number that a mark stands for."""
    verdict, _, form = how.rpartition(" ")
    if verdict not in VERDICTS or form not in FORMS:
        raise ValueError(f"{how!r} is none of {', '.join(FORMS)}, after {', '.join(VERDICTS[1:])}")
    names = _all(found, what) if tasks == "all" else tasks.split()
    values = _values(found, what, names, None if split == OWN else split)
    if verdict and (values.kind != "difference" or form in ("sd", "interval")):
        raise ValueError(f"there is no {how!r} of a {values.kind}")
    groups = list(values.by_task.values())
    if form == "sd":
        (only,) = groups
        return spread_text(only)
    numbers = _numbers(groups, form)
    _check(interval(groups) if verdict == "tie" else numbers, verdict)
    if verdict in ("above", "below"):
        numbers = sorted(map(abs, numbers)) if form == "range" else [abs(n) for n in numbers]
    shape = SHAPES["score" if verdict in ("above", "below") else values.kind]
    texts = [f"{number:{shape}}" for number in numbers]
    if form in ("range", "interval"):
        return " to ".join(dict.fromkeys(texts))
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _all(found: Sequence[Result], what: str) -> list[str]:
    """The tasks of what comes first, in their order in the records."""
    arms = ARM.findall(what)
    fit = [r for r in found if not arms or (r.arm, budget_text(r.budget)) == arms[0]]
    return list(dict.fromkeys(result.problem.task for result in fit))


def _values(found: Sequence[Result], what: str, tasks: Sequence[str], split: str | None) -> Values:
    arms = ARM.findall(what)
    measure, of, _ = what.partition(" of ")
    if of and not arms:
        arm = what.removeprefix(measure + of)
        return Values({task: [_for_target(found, measure, arm, task)] for task in tasks}, "ratio")
    if of:
        (arm,) = arms
        return Values({task: _perplexity(found, task, *arm, split) for task in tasks}, "score")
    if " / " in what:
        return Values({task: [_seconds(found, task, *arms)] for task in tasks}, "ratio")
    if " - " in what:
        ours, theirs = arms
        return Values({t: _differences(found, t, ours, theirs, split) for t in tasks}, "difference")
    (arm,) = arms
    own = {task: _scores(found, task, *arm, split) for task in tasks}
    return Values({task: [100 * v for v in own[task].values()] for task in tasks}, "score")


def _one(found: Sequence[Result], task: str, arm: str, budget: str) -> Result:
    wanted = (task, arm, budget)
    fit = [r for r in found if (r.problem.task, r.arm, budget_text(r.budget)) == wanted]
    if len(fit) != 1:
        raise ValueError(f"{len(fit)} results of {arm} at {budget} on {task}")
    return fit[0]


def _scores(
    found: Sequence[Result], task: str, arm: str, budget: str, split: str | None
) -> dict[int, float]:
    scores = _one(found, task, arm, budget).scores(split)
    if not scores:
        raise ValueError(f"{task} has no {split} split")
    return scores


def _differences(
    found: Sequence[Result],
    task: str,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    split: str | None,
) -> list[float]:
    first, second = (_scores(found, task, *arm, split) for arm in (ours, theirs))
    return [100 * (first[seed] - second[seed]) for seed in first if seed in second]


def _perplexity(
    found: Sequence[Result], task: str, arm: str, budget: str, split: str | None
) -> list[float]:
    result = _one(found, task, arm, budget)
    return [run["metrics"][split or result.split][PERPLEXITY] for run in result.runs.values()]


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
    numbers = {
        "mean": lambda: [statistics.fmean(means)],
        "each": lambda: means,
        "range": lambda: [min(means), max(means)],
        "interval": lambda: interval(groups),
    }[form]()
    if not all(map(math.isfinite, numbers)):
        raise ValueError("the records tell no number: too few seeds, or a target not reached")
    return numbers
