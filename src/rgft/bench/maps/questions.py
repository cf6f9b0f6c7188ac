"""What maps of several runs are asked, a table for each question; no rows where no answer is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from rgft.bench.comparisons import against_reference, levers
from rgft.bench.maps.agreement import (
    Estimate,
    alike,
    comparable,
    cosine,
    grouping,
    over_pairs,
    rank_correlation,
)
from rgft.bench.maps.run_maps import LEAST_COMPONENTS, RunMap, profile, run_maps
from rgft.bench.maps.traits import of_traits, with_traits
from rgft.bench.results import REFERENCE, Problem, Result, shown
from rgft.bench.statistics import holm, interval
from rgft.bench.table import Table, budget_text

RANK = "rank correlation"


def all_tables(found: Sequence[Result]) -> list[Table]:
    """Every table that has rows."""
    maps = [one for one in run_maps(found) if comparable([one.end])]
    told = [over_seeds(maps, found), by_task(maps), of_tasks(maps, found)]
    told += [of_methods(maps, found), early(maps), of_traits(found), with_traits(found)]
    return [table for table in told if table.rows]


def over_seeds(maps: Sequence[RunMap], found: Sequence[Result]) -> Table:
    """Does another seed give the same map?"""
    rows, apart = [], []
    for problem, arm, budget in dict.fromkeys((m.problem, m.arm, m.budget) for m in maps):
        ends = [m.end for m in maps if (m.problem, m.arm, m.budget) == (problem, arm, budget)]
        named = [shown(problem, found), arm, budget_text(budget)]
        if len(ends) > 1 and not comparable(ends):
            apart.append(" ".join(named))
        elif len(ends) > 1:
            seen = len(set.intersection(*map(set, ends)))
            told = [_told(over_pairs(ends, measure)) for measure in (rank_correlation, cosine)]
            rows.append([*named, str(len(ends)), str(seen), *told])
    caption = (
        "Maps at the end of runs that differ in the seed alone: mean over pairs of seeds, and a "
        "95% bootstrap interval over components, which says how much hangs on single ones of them."
        + _left_out(apart)
    )
    header = ["task", "arm", "budget", "seeds", "components", RANK, "cosine"]
    return Table("Error maps: other seeds", caption, header, rows)


def by_task(maps: Sequence[RunMap]) -> Table:
    """Does the map say which task it is of?"""
    named, told, apart = [], [], []
    for (model, arm, budget), group in _by_arm(maps).items():
        ends = [m.end for m in group]
        one = grouping(ends, [m.problem for m in group]) if comparable(ends) else None
        if not comparable(ends):
            apart.append(f"{arm} {budget_text(budget)}")
        if one is not None:
            tasks = len({m.problem for m in group})
            named.append([model, arm, budget_text(budget), str(tasks), str(len(group))])
            told.append(one)
    adjusted = holm([one.p for one in told])
    rows = [
        [*names, f"{one.within:.2f}", f"{one.between:.2f}", f"{p:.3g}"]
        for names, one, p in zip(named, told, adjusted, strict=True)
    ]
    caption = (
        "Mean rank correlation of maps of the same task at different seeds, and of maps of "
        "different tasks. p is that of a permutation test (Mantel 1967), corrected by Holm over "
        "the table: how often tasks that are assigned at random are told apart as well. Maps of "
        "different tasks may be much alike because low layers have large gradients on every task."
        + _left_out(apart)
    )
    header = ["model", "arm", "budget", "tasks", "runs", "same task", "other task", "p"]
    return Table("Error maps: the task in them", caption, header, rows)


def of_tasks(maps: Sequence[RunMap], found: Sequence[Result]) -> Table:
    """Which tasks have like maps? Of one arm: full fine-tuning, or else the first."""
    arms = list(dict.fromkeys(m.arm for m in maps))
    arm = REFERENCE if REFERENCE in arms else next(iter(arms), None)
    rows = []
    for (_, name, budget), group in _by_arm(maps).items():
        problems = dict.fromkeys(m.problem for m in group)
        for first, second in combinations(problems, 2) if name == arm else ():
            ours, theirs = ([m for m in group if m.problem == p] for p in (first, second))
            groups = _paired(ours, theirs, lambda a, b: True)
            values = [value for part in groups.values() for value in part]
            if values:
                spread = f"{min(values):.2f} to {max(values):.2f}"
                told = [f"{statistics.fmean(values):.2f}", spread, str(len(values))]
                rows.append([shown(first, found), shown(second, found), budget_text(budget), *told])
    caption = (
        f"Rank correlation of the maps of two tasks under the arm {arm}: mean and range over all "
        "pairs of their runs."
    )
    header = ["task", "other task", "budget", RANK, "range", "pairs"]
    return Table("Error maps: pairs of tasks", caption, header, rows)


def of_methods(maps: Sequence[RunMap], found: Sequence[Result]) -> Table:
    """Do two arms see the same map? Each with what it extends, and with full fine-tuning."""
    rows = []
    for arm, base in dict.fromkeys([*levers(found), *against_reference(found)]):
        for budget in dict.fromkeys(m.budget for m in maps if m.arm == arm):
            ours = [m for m in maps if (m.arm, m.budget) == (arm, budget)]
            theirs = [m for m in maps if (m.arm, m.budget) == (base, budget)]
            groups = _paired(ours, theirs, _same_start)
            if groups:
                counts = [
                    count
                    for a in ours
                    for b in theirs
                    if _same_start(a, b)
                    and (count := len(a.end.keys() & b.end.keys())) >= LEAST_COMPONENTS
                ]
                pairs = sum(map(len, groups.values()))
                told = [_told(_over_runs(list(groups.values()))), str(len(groups)), str(pairs)]
                shared = sorted({min(counts), max(counts)})
                rows.append([arm, base, budget_text(budget), " to ".join(map(str, shared)), *told])
    caption = (
        "Rank correlation of the maps of two arms, paired by task and seed: mean over tasks, and a "
        "95% bootstrap interval over seeds within tasks, over the components that both scored."
    )
    header = ["arm", "other arm", "budget", "components", RANK, "tasks", "pairs"]
    return Table("Error maps: other methods", caption, header, rows)


def early(maps: Sequence[RunMap]) -> Table:
    """Does the map after a tenth of the run say what it will be, and better than other tasks do?"""
    rows = []
    for (model, arm, budget), group in _by_arm(maps).items():
        own: dict[Problem, list[float]] = {}
        gain: dict[Problem, list[float]] = {}
        for one in group:
            value = math.nan if one.early is None else alike(one.early, one.end, rank_correlation)
            if not math.isnan(value):
                own.setdefault(one.problem, []).append(value)
                above = _above_usual(one, [m.end for m in group if m.problem != one.problem])
                if not math.isnan(above):
                    gain.setdefault(one.problem, []).append(above)
        if own:
            better = _told(_over_runs(list(gain.values())), "+") if gain else "-"
            runs = str(sum(map(len, own.values())))
            told = _told(_over_runs(list(own.values())))
            rows.append([model, arm, budget_text(budget), str(len(own)), runs, told, better])
    caption = (
        "Rank correlation of the map after 10% of a run with that at its end: mean over tasks, "
        "with a 95% bootstrap interval over seeds within tasks. Beside it, by how much that is "
        "above what the usual map of the other tasks (the geometric mean of theirs) has with it: 0 "
        "says that the first tenth of the run told nothing about this task."
    )
    header = ["model", "arm", "budget", "tasks", "runs", RANK, "above the other tasks'"]
    return Table("Error maps: after a tenth of the run", caption, header, rows)


def _above_usual(one: RunMap, others: Sequence[Mapping[str, float]]) -> float:
    """By how much the early map is nearer to the end than the others' profile; NaN without any.

    Both over the components that all have.
    """
    if one.early is None or not others:
        return math.nan
    usual = profile(others)
    begun = {name: value for name, value in one.early.items() if name in usual}
    usual = {name: value for name, value in usual.items() if name in begun}
    known = alike(begun, one.end, rank_correlation)
    return known - alike(usual, one.end, rank_correlation)


def _left_out(names: Sequence[str]) -> str:
    """What to add to a caption: whose maps have too little in common."""
    if not names:
        return ""
    few = f"fewer than {LEAST_COMPONENTS} of whose components were scored in all their runs"
    return f" Left out are those {few}: {', '.join(names)}."


def _by_arm(maps: Sequence[RunMap]) -> dict[tuple[str, str, float | str], list[RunMap]]:
    groups: dict[tuple[str, str, float | str], list[RunMap]] = {}
    for one in maps:
        groups.setdefault((one.problem.model, one.arm, one.budget), []).append(one)
    return groups


def _paired(
    ours: Sequence[RunMap],
    theirs: Sequence[RunMap],
    matched: Callable[[RunMap, RunMap], bool],
) -> dict[Problem, list[float]]:
    """Rank correlations of the pairs that match, by the problem of the first."""
    groups: dict[Problem, list[float]] = {}
    for a in ours:
        for b in theirs:
            value = alike(a.end, b.end, rank_correlation) if matched(a, b) else math.nan
            if not math.isnan(value):
                groups.setdefault(a.problem, []).append(value)
    return groups


def _same_start(a: RunMap, b: RunMap) -> bool:
    return (a.problem, a.seed) == (b.problem, b.seed)


def _over_runs(groups: Sequence[Sequence[float]]) -> Estimate:
    """Mean over tasks of means over runs, with the interval that comparisons have."""
    mean = statistics.fmean(statistics.fmean(values) for values in groups)
    return Estimate(mean, *interval(groups))


def _told(estimate: Estimate, sign: str = "") -> str:
    around = f" [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"
    return f"{estimate.value:{sign}.2f}{'' if math.isnan(estimate.low) else around}"
