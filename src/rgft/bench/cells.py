"""The cells of a suite, and which of them are due."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rgft.bench.choice import chosen_rate
from rgft.bench.suite import NEEDS_BUDGET, SWEEPS, Arm, Budget, Place, Suite, in_suite
from rgft.errors import InputError
from rgft.extensions import digests
from rgft.methods import find_method
from rgft.settings import method_config
from rgft.spec import RunSpec, arguments, command, relative_to
from rgft.tasks.folder import digest as digest_of_folder

SHOWN = 8  # digits of a digest

Record = dict[str, Any]


class Point(NamedTuple):
    """What has a learning rate of its own: one arm on one task, with one model and one budget."""

    model: Place
    task: Place
    arm: Arm
    budget: Budget


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a suite.

    Attributes:
        key: Digest of all that decides its result; two cells with the same one are the same.
        labels: What its record says of it: suite, model, task, arm, budget, rate, seed, extends,
            changes, the command that would run it, with paths from the working folder, and the
            digests of data and of --extend files of the user's own.
        spec: What `rgft train` runs.
    """

    key: str
    labels: Mapping[str, Any]
    spec: RunSpec

    def __str__(self) -> str:
        """One line for people."""
        return shown_labels({**self.labels, "seed": self.spec.seed})


def shown_labels(labels: Mapping[str, Any]) -> str:
    """Which cell it is, in a line for people.

    >>> shown_labels({"task": "trec", "arm": "rgft", "budget": 0.3, "rate": None, "seed": 0})
    'trec rgft budget 0.3 own rate seed 0'
    """
    rate = "own rate" if labels["rate"] is None else f"rate {labels['rate']:g}"
    task, arm, budget, seed = (labels[name] for name in ("task", "arm", "budget", "seed"))
    return f"{task} {arm} budget {budget} {rate} seed {seed}"


def points(suite: Suite) -> Iterator[Point]:
    """Every point, tasks outermost."""
    for model in suite.models:
        for task in suite.tasks:
            for arm in (arm for arm in suite.arms if arm.runs_on(task)):
                for budget in arm.budgets:
                    yield Point(model, task, arm, budget)


def cell(suite: Suite, point: Point, rate: float | None, seed: int) -> Cell:
    """The cell of a point at one rate and seed.

    Raises:
        InputError: Its options do not go together.
    """
    model, task, arm, budget = point
    skips = find_method(str(arm.options["method"])).skip
    needs = skips or any(arm.options.get(name) for name in NEEDS_BUDGET)
    given = None if budget == 1 and not needs else str(budget)
    options = {**model.options, **task.options, **arm.options}
    settings = {**task.options.get("settings", {}), **arm.options.get("settings", {})}
    try:
        spec = RunSpec(
            **{**options, "settings": settings, "budget": given, "lr": rate, "seed": seed},
            extend=suite.extend or None,
        )
        method_config(spec, find_method(spec.method))
        key = key_of(spec, model.name, task.name)
    except InputError as error:
        where = f"arm {arm.name} on {task.name}, budget {budget}"
        raise InputError(f"{where}: {in_suite(str(error))}") from error
    labels = {
        **{"suite": suite.name, "model": model.name, "task": task.name, "arm": arm.name},
        **{"budget": budget, "rate": rate, "seed": seed},
        **{"extends": arm.extends, "changes": dict(arm.changes)},
        "command": command(relative_to(Path.cwd(), spec)),
        "data": None if spec.data is None else _digest(spec.data)[:SHOWN],
        "extensions": [digest[:SHOWN] for digest in digests(spec.method, spec.task)],
    }
    return Cell(key, labels, spec)


def key_of(spec: RunSpec, model: str, task: str) -> str:
    """Digest of a run: its options but for defaults.

    A method or task of the user's own counts with its whole file, and a folder of data with its
    files, so that an edited one is another. A model's folder counts by its name in the suite.
    """
    named = replace(spec, model=model, task=task, data=None, extend=None)
    values = arguments(named)
    for option in fields(RunSpec):
        default = option.default
        if default is not MISSING and values[option.name] == default:
            del values[option.name]
    if spec.data is not None:
        values["data"] = _digest(spec.data)
    own = digests(spec.method, spec.task)
    if own:
        values["extend"] = own
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _digest(folder: str) -> str:
    return digest_of_folder(Path(folder))


def sweep_seeds(suite: Suite, arm: Arm) -> tuple[int, ...]:
    """The seeds at which every rate of the arm runs."""
    whole = len(arm.rates) == 1 or suite.sweep == SWEEPS[1]
    return suite.seeds if whole else suite.seeds[:1]


def count(suite: Suite) -> int:
    """How many cells a suite has, all told."""
    total = 0
    for point in points(suite):
        swept = sweep_seeds(suite, point.arm)
        total += len(point.arm.rates) * len(swept) + len(suite.seeds) - len(swept)
    return total


def settled(suite: Suite, records: Mapping[str, Record]) -> tuple[list[Cell], list[Cell]]:
    """The cells that are known by now: with a record, and without one (due).

    All rates come first; the other seeds of a point follow once all its rates are settled, at the
    rate that is best on the validation split. A point whose rates have all failed has no more.

    Args:
        suite: The suite.
        records: By key.
    """
    done: list[Cell] = []
    due: list[Cell] = []
    later: list[Cell] = []
    for point in points(suite):
        seeds = sweep_seeds(suite, point.arm)
        sweep = [cell(suite, point, rate, seed) for seed in seeds for rate in point.arm.rates]
        _sort(sweep, records, done, due)
        if all(one.key in records for one in sweep):
            rate = chosen_rate([records[one.key] for one in sweep])
            if rate != "none":
                rest = [s for s in suite.seeds if s not in seeds]
                _sort([cell(suite, point, rate, s) for s in rest], records, done, later)
    return done, [*due, *later]


def _sort(
    cells: Iterable[Cell], records: Mapping[str, Record], done: list[Cell], due: list[Cell]
) -> None:
    for one in cells:
        (done if one.key in records else due).append(one)


def check_arms_differ(suite: Suite) -> None:
    """Two arms that are one and the same would be run once and shown twice.

    Raises:
        InputError: There are two such arms.
    """
    seen: dict[str, str] = {}
    for point in points(suite):
        for rate in point.arm.rates:
            key = cell(suite, point, rate, suite.seeds[0]).key
            if seen.setdefault(key, point.arm.name) != point.arm.name:
                raise InputError(
                    f"arms {seen[key]} and {point.arm.name} are the same runs; drop one of them"
                )


def by_key(records: Sequence[Record]) -> dict[str, Record]:
    """The latest record of each cell."""
    return {record["key"]: record for record in records if "key" in record}
