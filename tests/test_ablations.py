"""Suites in which every arm differs from the first in one thing, on a tiny model in its place.

A BERT of as many layers as MiniLM, a few random rows in the hub's schema, and the suite's options
but for the learning rate, which is large so that every difference shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import hub_rows
import tiny_run
from rgft.bench.cells import Cell, Point, cell, check_arms_differ
from rgft.bench.execute import execute
from rgft.bench.suite import Arm, Suite, load_suite

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
LEVERS, ABLATIONS = (load_suite(SUITES / f"{name}.yaml") for name in ("levers", "ablations"))
FIRST, *OTHERS = {arm.name: arm for arm in (*LEVERS.arms, *ABLATIONS.arms)}.values()
ROWS = {"train": 192, "validation": 16}
RATE = 1e-2
# the labels are noise, so that no layer knows them: every one that is kept trains, and no output is
# stored; and there are as many of each label
NO_EFFECT_HERE = ("no-cache", "no-balance")
Run = Callable[[Arm, str], dict[str, Any]]


def tasks_of(arm: Arm) -> list[str]:
    return [task.name for task in LEVERS.tasks if arm.runs_on(task)]


def small(arm: Arm, task: str, model: Path) -> Cell:
    """The arm at its first budget and seed."""
    (place,) = (one for one in LEVERS.tasks if one.name == task)
    one = cell(LEVERS, Point(LEVERS.models[0], place, arm, arm.budgets[0]), None, LEVERS.seeds[0])
    return replace(one, spec=replace(one.spec, model=str(model), lr=RATE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The record of an arm on a task."""
    folder = tmp_path_factory.mktemp("ablations")
    model = tiny_run.build_model(folder / "model", layers=6)
    for task in LEVERS.tasks:
        hub_rows.write(task.name, folder / "data" / task.name, ROWS)

    @cache
    def record_of(arm: str, task: str) -> dict[str, Any]:
        (one,) = (other for other in (FIRST, *OTHERS) if other.name == arm)
        record = execute(small(one, task, model), folder / f"{arm}-{task}", threads=1)
        assert record is not None and record["status"] == "finished", record
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGFT_DATA", str(folder / "data"))
        patch.setattr("rgft.opening.VISITS_OF_ALL", 1)  # the suites' own tasks have rows enough
        yield lambda arm, task: record_of(arm.name, task)


@pytest.mark.parametrize("arm", OTHERS, ids=lambda arm: arm.name)
def test_every_arm_runs_and_acts_where_it_can(arm: Arm, run: Run) -> None:
    task = tasks_of(arm)[-1]
    record, first = run(arm, task), run(FIRST, task)
    assert abs(record["flops"]["share"] - 0.3) < 0.1
    losses = [one["metrics"]["validation"]["loss"] for one in (record, first)]
    assert (losses[0] != losses[1]) == (arm.name not in NO_EFFECT_HERE), losses


@pytest.mark.parametrize("suite", [LEVERS, ABLATIONS], ids=lambda suite: suite.name)
def test_every_arm_extends_the_first(suite: Suite) -> None:
    check_arms_differ(suite)
    assert {arm.extends for arm in suite.arms} == {None, FIRST.name}
    assert [arm.name for arm in suite.arms if arm.extends is None] == [FIRST.name]


def test_arms_of_the_same_name_are_the_same_cells() -> None:
    assert LEVERS.tasks == ABLATIONS.tasks
    shared = {arm.name for arm in LEVERS.arms} & {arm.name for arm in ABLATIONS.arms}
    assert len(shared) >= 4
    for task in LEVERS.tasks:
        for name in shared:
            keys = {
                cell(suite, Point(suite.models[0], task, arm, 0.3), None, 0).key
                for suite in (LEVERS, ABLATIONS)
                for arm in suite.arms
                if arm.name == name
            }
            assert len(keys) == 1, name
