"""From records to results: each arm at the rate that validation chose, by task, budget and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rgft.bench.cells import by_key
from rgft.bench.choice import chosen_rate
from rgft.bench.statistics import cost_to_target
from rgft.stages import STANDARD_ERRORS, Yardstick

TARGET = 0.99  # of the best mean of full fine-tuning
REFERENCE = "full"
SPLITS = ("validation", "test")
CORRELATIONS = ("matthews_correlation", "pearson", "spearman")  # 0 for any constant answer


class Problem(NamedTuple):
    """What arms can be compared on: a task with a model, its training rows and epochs.

    Of a folder of the user's own `data` tell one edition of it from another.
    """

    task: str
    model: str
    rows: int
    epochs: float
    data: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One arm at one budget on one problem, at its chosen rate.

    Attributes:
        problem: The problem.
        arm: The arm.
        budget: Its budget.
        rate: The chosen rate; None for the method's own.
        rates: The rates that have been tried, in order, those that failed among them.
        runs: The finished records at that rate, by seed.
        failed: How many cells have failed, at whatever rate.
        split: Where arms of the problem are compared: "test" where all have it, else "validation".
        chance: By split, what an answer that ignores its input is worth, where that is known.
    """

    problem: Problem
    arm: str
    budget: float | str
    rate: float | None
    rates: tuple[float | None, ...]
    runs: Mapping[int, Mapping[str, Any]]
    failed: int
    split: str
    chance: Mapping[str, Yardstick]

    @property
    def sweep(self) -> str:
        """The rate, of how many, and whether one beyond them may be better.

        >>> problem = Problem("t", "m", rows=9, epochs=1.0)
        >>> Result(problem, "arm", 1.0, 2e-4, (1e-4, 2e-4), {}, 0, "test", {}).sweep
        '0.0002 of 2, the largest'
        """
        if self.rate is None:
            return f"own of {len(self.rates)}"
        numbers = [rate for rate in self.rates if rate is not None]
        edges = {numbers[0]: ", the smallest", numbers[-1]: ", the largest"}
        edge = edges.get(self.rate, "") if len(numbers) > 1 else ""
        return f"{self.rate:g} of {len(self.rates)}{edge}"

    @property
    def metric(self) -> str:
        """Name of the headline metric."""
        return str(next(iter(self.runs.values()))["metric"])

    @property
    def idle(self) -> int:
        """How many runs ended before the method's first decision."""
        return sum(bool(run.get("idle")) for run in self.runs.values())

    def scores(self, split: str | None = None) -> dict[int, float]:
        """The headline metric by seed, of the runs that have the split; by default its own."""
        found = {}
        for seed, run in self.runs.items():
            value = run["metrics"].get(split or self.split, {}).get(run["metric"])
            if value is not None:
                found[seed] = float(value)
        return found

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN without any."""
        scores = self.scores()
        return statistics.fmean(scores.values()) if scores else float("nan")

    def at_chance(self, split: str | None = None) -> int:
        """How many seeds are no better than an answer that ignores its input, as far as known."""
        chance = self.chance.get(split or self.split)
        return 0 if chance is None else sum(map(chance.at_chance, self.scores(split).values()))

    @property
    def share(self) -> float:
        """FLOPs spent, as a share of full fine-tuning; mean over seeds."""
        return statistics.fmean(run["flops"]["share"] for run in self.runs.values())

    @property
    def flops(self) -> float:
        """FLOPs spent; mean over seeds."""
        return statistics.fmean(run["flops"]["spent"] for run in self.runs.values())

    @property
    def seconds(self) -> float:
        """Seconds of training and of what precedes it, scoring included; median over seeds."""
        told = [run["seconds"] for run in self.runs.values()]
        return float(statistics.median(s["train"] + (s.get("prepare") or 0.0) for s in told))

    @property
    def processor(self) -> float:
        """The same in processor seconds, which other work changes little; NaN where not recorded.

        What precedes training is on the wall in older records, of a machine that may have paused.
        """
        told = [run["seconds"] for run in self.runs.values()]
        if any("processor" not in seconds for seconds in told):
            return math.nan
        prepared = [s.get("prepare_processor", s.get("prepare")) or 0.0 for s in told]
        trained = [s["processor"] for s in told]
        return float(statistics.median(map(sum, zip(trained, prepared, strict=True))))


def results(records: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Every arm at every budget on every problem, in the order in which they first occur."""
    finished: dict[tuple[Problem, str, float | str], list[Mapping[str, Any]]] = {}
    failed: dict[tuple[str, str, str, float | str], list[float | None]] = {}
    for record in by_key(list(map(dict, records))).values():
        if record["status"] == "finished":
            rows, epochs = record["rows"]["train"], record["epochs"]
            data = record.get("data") or ""
            problem = Problem(record["task"], record["model"], rows, epochs, data)
            finished.setdefault((problem, record["arm"], record["budget"]), []).append(record)
        else:
            place = record["task"], record["model"], record["arm"], record["budget"]
            failed.setdefault(place, []).append(record["rate"])
    found = []
    tested: dict[Problem, bool] = {}
    chances: dict[Problem, dict[str, Any]] = {}  # for older records, which do not tell
    for (problem, _, _), group in finished.items():
        tested[problem] = tested.get(problem, True) and all("test" in r["metrics"] for r in group)
        chances.setdefault(problem, {}).update(_told_chance(group))
    for (problem, arm, budget), group in finished.items():
        rate = chosen_rate(group)
        assert rate != "none"
        runs = {record["seed"]: record for record in group if record["rate"] == rate}
        lost = failed.get((problem.task, problem.model, arm, budget), [])
        tried = {record["rate"] for record in group} | set(lost)
        rates = tuple(sorted(tried, key=lambda rate: rate or 0.0))
        split = "test" if tested[problem] else "validation"
        chance = _chances(group[0], {**chances[problem], **_told_chance(group)})
        found.append(Result(problem, arm, budget, rate, rates, runs, len(lost), split, chance))
    return found


def _told_chance(group: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the first record that tells of chance says of it, by split."""
    return next((record["chance"] for record in group if record.get("chance")), {})


def _chances(record: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Yardstick]:
    """What tells whether scores are above chance, by split; where chance and its error are known.

    Args:
        record: One of the runs.
        told: What records of the problem say of chance, by split.
    """
    metric, found = record["metric"], {}
    if metric in STANDARD_ERRORS:
        for split in record["metrics"]:
            known = told.get(split, {})
            if known.get("value") is not None:
                found[split] = Yardstick(metric, known["rows"], known["value"])
            elif metric in CORRELATIONS and record["rows"].get(split):
                found[split] = Yardstick(metric, record["rows"][split], 0.0)
    return found


def judged_on(found: Sequence[Result]) -> str:
    """The splits that arms are compared on, in words."""
    splits = {result.split for result in found}
    if len(splits) < 2:
        return f"{splits.pop() if splits else 'validation'} split"
    without = dict.fromkeys(shown(r.problem, found) for r in found if r.split != "test")
    return f"test split, of {', '.join(without)} validation"


def clock(found: Iterable[Result]) -> str:
    """The seconds that results are compared by: "processor" where all have them, else "seconds"."""
    return "seconds" if any(math.isnan(result.processor) for result in found) else "processor"


def costs_to_target(found: Sequence[Result], cost: str) -> dict[str, dict[str, float]]:
    """Problem -> arm -> what it takes to reach 99% of the best mean of full fine-tuning.

    Args:
        found: Results.
        cost: "flops", or "seconds", which are those of `clock`.

    Returns:
        Infinite where no budget that was run gets there; nothing without full fine-tuning, or where
        half of its seeds or more are at chance.
    """
    told: dict[str, dict[str, float]] = {}
    for problem in dict.fromkeys(result.problem for result in found):
        here = [result for result in found if result.problem == problem]
        full = [r for r in here if r.arm == REFERENCE and math.isfinite(r.mean)]
        best = max(full, key=lambda r: r.mean, default=None)
        if best is not None and 2 * best.at_chance() < len(best.scores()):
            name = clock(here) if cost == "seconds" else cost
            told[shown(problem, found)] = {
                arm: cost_to_target(
                    [(getattr(r, name), r.mean) for r in here if r.arm == arm],
                    TARGET * best.mean,
                )
                for arm in dict.fromkeys(result.arm for result in here)
            }
    return told


def shown(problem: Problem, found: Sequence[Result]) -> str:
    """A problem's name: its task, and what else is needed to tell it from the others."""
    others = {result.problem for result in found if result.problem.task == problem.task}
    parts = [problem.task]
    if len({result.problem.model for result in found}) > 1:
        parts.append(problem.model)
    if len({other.rows for other in others}) > 1:
        parts.append(f"{problem.rows} rows" if problem.rows else "all rows")
    if len({other.epochs for other in others}) > 1:
        parts.append(f"{problem.epochs:g} epoch{'s' * (problem.epochs != 1)}")
    if len({other.data for other in others}) > 1:
        parts.append(f"data {problem.data}" if problem.data else "other data")
    return ", ".join(parts)
