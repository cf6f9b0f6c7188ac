"""The tables of the page: quality, comparisons, costs, and what stands behind each number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rgft.bench.areas import areas
from rgft.bench.beyond_headline import calibration, forgetting, other_domains, perplexity
from rgft.bench.comparisons import (
    LEAST_PAIRS,
    OURS,
    SURE,
    Comparison,
    against_reference,
    compare,
    levers,
    ours_against_others,
)
from rgft.bench.results import (
    REFERENCE,
    SPLITS,
    TARGET,
    Result,
    clock,
    costs_to_target,
    judged_on,
    shown,
)
from rgft.bench.table import (
    IDLE,
    Table,
    budget_order,
    budget_text,
    explained,
    interval_text,
    spread,
)
from rgft.report import amounts


def all_tables(found: Sequence[Result]) -> list[Table]:
    """Every table that has rows."""
    told = [
        *(leaderboard(found), against_full(found), ours_against(found)),
        *(lever_table(found), areas(found)),
        *(targets(found), other_domains(found), forgetting(found)),
        *(calibration(found), perplexity(found), runs(found)),
    ]
    return [table for table in told if table.rows]


def leaderboard(found: Sequence[Result]) -> Table:
    """Quality by arm and budget, a column a task."""
    problems = list(dict.fromkeys(result.problem for result in found))
    at = {(r.problem, r.arm, r.budget): r for r in found}
    rows = []
    for budget, arm in dict.fromkeys((r.budget, r.arm) for r in found):
        here = [at.get((problem, arm, budget)) for problem in problems]
        there = [result for result in here if result is not None]
        whole = len(there) == len(problems)
        mean = statistics.fmean(r.mean for r in there) if whole else math.nan
        share = statistics.fmean(r.share for r in there)
        cells = ["-" if r is None else spread(r) for r in here]
        row = [budget_text(budget), arm, *cells, _points(mean), f"{share:.3f}"]
        rows.append((budget_order(budget), -mean if whole else math.inf, row))
    rows.sort(key=lambda row: row[:2])
    header = ["budget", "arm", *(shown(p, found) for p in problems), "mean", "FLOPs, share of full"]
    caption = (
        f"Headline metric x 100 on the {judged_on(found)}: mean ± standard deviation over "
        "seeds, at the learning rate that validation chose. The mean is over all tasks, for arms "
        "that have all."
    )
    return explained(Table("Leaderboard", caption, header, [row[2] for row in rows]))


def against_full(found: Sequence[Result]) -> Table:
    """Every arm against full fine-tuning on a schedule shortened to the same budget."""
    return _compared(
        "Against full fine-tuning at the same budget",
        compare(found, against_reference(found)),
        found,
    )


def ours_against(found: Sequence[Result]) -> Table:
    """The arm `rgft` against every other at the same budget; empty without one of that name."""
    return _compared(
        f"{OURS} against the others at the same budget",
        compare(found, ours_against_others(found)),
        found,
    )


def lever_table(found: Sequence[Result]) -> Table:
    """Every arm against the one that it extends: what a lever is worth."""
    return _compared("Levers", compare(found, levers(found)), found)


def _compared(title: str, comparisons: Sequence[Comparison], found: Sequence[Result]) -> Table:
    idle = {(r.arm, r.budget) for r in found if r.idle}
    caption = (
        "Difference in points, paired by task and seed; 95% bootstrap interval over seeds within "
        "tasks (too narrow with few of them); p of the sign-flip test, corrected by Holm over "
        f"the table. Fewer than {LEAST_PAIRS} pairs, or one of a task alone, are too few to tell; "
        f"a tie is an interval that holds 0; unsure is one that does not, with p above {SURE}. "
        "On the validation split arms with several rates were chosen; the verdict does not count "
        "it, but a lead on one split alone is none to build on."
    )
    header = [
        *("budget", "arm", "against", "difference", "95% interval", "p", "tasks", "pairs"),
        *("verdict", "on validation"),
    ]
    rows = [
        [
            budget_text(c.budget),
            f"{c.arm} ({IDLE})" if (c.arm, c.budget) in idle else c.arm,
            *(c.base, f"{c.difference:+.1f}"),
            interval_text(c.low, c.high),
            *(f"{c.p:.3g}", str(c.problems), str(c.pairs), c.verdict),
            _on_validation(*c.validation),
        ]
        for c in comparisons
    ]
    return explained(Table(title, caption, header, rows))


def _on_validation(difference: float, low: float, high: float) -> str:
    if math.isnan(difference):
        return "-"
    ends = "" if math.isnan(low) else f" {interval_text(low, high)}"
    return f"{difference:+.1f}{ends}"


def targets(found: Sequence[Result]) -> Table:
    """What each arm needs for 99% of the best of full fine-tuning, relative to the cheapest."""
    told = {cost: costs_to_target(found, cost) for cost in ("flops", "seconds")}
    wanted: dict[str, float] = {}
    for r in found:
        if r.arm == REFERENCE and math.isfinite(r.mean):
            name = shown(r.problem, found)
            wanted[name] = max(TARGET * r.mean, wanted.get(name, -math.inf))
    rows = []
    for problem, arms in told["flops"].items():
        for arm in arms:
            cells = []
            for cost in ("flops", "seconds"):
                costs = told[cost][problem]
                rest = min((c for name, c in costs.items() if name != arm), default=math.inf)
                cells += [_amount(cost, costs[arm]), _ratio(costs[arm], rest)]
            rows.append([problem, _points(wanted[problem]), arm, *cells])
    caption = (
        "The least that was run to reach the target, 99% of full fine-tuning's best mean, at "
        f"whatever budget ({judged_on(found)}), and its "
        "ratio to the cheapest of the other arms. Seconds are the processor's where all of a task "
        "have them. Tasks on which half of the seeds of full fine-tuning are at chance have no "
        "target."
    )
    header = ["task", "target", "arm", "FLOPs", "ratio of FLOPs", "seconds", "ratio of seconds"]
    return Table("Cost to target", caption, header, rows)


def runs(found: Sequence[Result]) -> Table:
    """What stands behind each number: rates, seeds, both splits, cost."""
    rows = []
    clocks = {r.problem: clock(f for f in found if f.problem == r.problem) for r in found}
    for r in sorted(found, key=lambda r: (r.problem, budget_order(r.budget))):
        quality = [spread(r, split) for split in SPLITS]
        rows.append([shown(r.problem, found), budget_text(r.budget), r.arm, r.sweep,
                     str(len(r.runs)), str(r.failed), *quality, f"{r.share:.3f}",
                     amounts.duration(getattr(r, clocks[r.problem]))])  # fmt: skip
    header = ["task", "budget", "arm", "rate", "seeds", "failed", "validation", "test",
              "FLOPs, share of full", "seconds"]  # fmt: skip
    caption = (
        "Every arm at the rate that validation chose, of how many; where that is the largest or "
        "the smallest, one beyond may be better. Seconds are the processor's where all of a task "
        "have them."
    )
    return explained(Table("Runs", caption, header, rows))


def _points(mean: float) -> str:
    return "-" if math.isnan(mean) else f"{100 * mean:.1f}"


def _amount(cost: str, value: float) -> str:
    if math.isinf(value):
        return "not reached"
    return amounts.flops(value) if cost == "flops" else amounts.duration(value)


def _ratio(own: float, rest: float) -> str:
    return "-" if math.isinf(own) or math.isinf(rest) else f"{own / rest:.2f}"
