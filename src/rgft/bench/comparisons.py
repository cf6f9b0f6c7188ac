"""Two arms at the same budget, paired by task and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rgft.bench.results import REFERENCE, Problem, Result
from rgft.bench.statistics import holm, interval, paired_p

OURS = "rgft"
LEAST_PAIRS = 6  # of fewer, the least p of a sign-flip test, 2 / 2^n, is above .05
SURE = 0.05  # largest p


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of an arm from another, in points of the metric (x 100).

    Attributes:
        arm: The arm.
        base: What it is compared with.
        budget: The budget of both.
        difference: Mean over tasks of the mean over seeds.
        low: Lower end of the bootstrap interval; NaN with a single seed.
        high: Upper end.
        validation: The difference on the validation split, and its interval.
        p: Of the sign-flip test, adjusted by Holm over all comparisons of the table.
        problems: How many tasks both have.
        pairs: How many tasks and seeds.
    """

    arm: str
    base: str
    budget: float | str
    difference: float
    low: float
    high: float
    validation: tuple[float, float, float]
    p: float
    problems: int
    pairs: int

    @property
    def verdict(self) -> str:
        """In a word or two.

        "too few" pairs where none can tell, "tie" where the interval holds 0, "unsure" where it
        does not and p is above 0.05.
        """
        if self.pairs < LEAST_PAIRS or math.isnan(self.low):
            return "too few"
        if self.low <= 0 <= self.high:
            return "tie"
        if self.p > SURE:
            return "unsure"
        return "better" if self.low > 0 else "worse"


def compare(found: Sequence[Result], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Compares arms at every budget that both have, p adjusted over all of them."""
    told = []
    for budget in dict.fromkeys(result.budget for result in found):
        at = {(r.problem, r.arm): r for r in found if r.budget == budget}
        for arm, base in pairs:
            groups = list(_differences(at, arm, base).values())
            if groups:
                difference, low, high = _with_interval(groups)
                chosen_on = _differences(at, arm, base, "validation")
                told.append(
                    Comparison(
                        arm, base, budget, difference, low, high,
                        validation=_with_interval(list(chosen_on.values())),
                        p=paired_p(groups),
                        problems=len(groups), pairs=sum(map(len, groups)),
                    )
                )  # fmt: skip
    adjusted = holm([comparison.p for comparison in told])
    return [replace(one, p=p) for one, p in zip(told, adjusted, strict=True)]


def _with_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean over groups of their means, and the ends of its interval; NaN without a group."""
    if not groups:
        return math.nan, math.nan, math.nan
    return (statistics.fmean(statistics.fmean(g) for g in groups), *interval(groups))


def against_reference(found: Sequence[Result]) -> list[tuple[str, str]]:
    """Every arm with full fine-tuning at the same budget."""
    arms = dict.fromkeys(result.arm for result in found)
    return [(arm, REFERENCE) for arm in arms if arm != REFERENCE and REFERENCE in arms]


def ours_against_others(found: Sequence[Result]) -> list[tuple[str, str]]:
    """The arm `rgft` with every other at the same budget."""
    arms = dict.fromkeys(result.arm for result in found)
    return [(OURS, arm) for arm in arms if arm != OURS and OURS in arms]


def levers(found: Sequence[Result]) -> list[tuple[str, str]]:
    """Every arm with the one that it extends in its suite."""
    told: dict[str, str] = {}
    for result in found:
        for run in result.runs.values():
            if run.get("extends"):
                told[result.arm] = run["extends"]
    return list(told.items())


def differences(
    found: Sequence[Result], arm: str, base: str, budget: float | str
) -> dict[Problem, list[float]]:
    """Problem -> what the arm gains over the other, in points, one value a seed that both have."""
    at = {(r.problem, r.arm): r for r in found if r.budget == budget}
    return _differences(at, arm, base)


def _differences(
    at: dict[tuple[Problem, str], Result], arm: str, base: str, split: str | None = None
) -> dict[Problem, list[float]]:
    groups = {}
    for (problem, name), result in at.items():
        if name == arm and (problem, base) in at:
            ours, theirs = result.scores(split), at[problem, base].scores(split)
            shared = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
            if shared:
                groups[problem] = shared
    return groups
