"""Suites in which every arm differs from the first in one thing, on a tiny model in its place.

A BERT of as many layers as MiniLM, a few random rows in the hub's schema, and the suite's options
but for the learning rate, which is large so that every difference shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hub_rows
import tiny_run
from rgft.bench.cells import Cell, Point, cell, check_arms_differ
from rgft.bench.execute import execute
from rgft.bench.suite import Arm, Suite, load_suite

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
ROWS = {"train": 192, "validation": 16}
RATE = 1e-2
# the labels are noise, so that no layer knows them: all are kept and train, and no output is
# stored; there are as many of each, and no sample is visited twice
NO_EFFECT_HERE = ("all-layers", "no-cache", "no-balance", "skip-half")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.build_model(tmp_path_factory.mktemp("model") / "model", layers=6)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_DATA", str(tmp_path / "data"))
    for task in ("trec", "cola"):
        hub_rows.write(task, tmp_path / "data" / task, ROWS)


def small(suite: Suite, arm: Arm, model: Path) -> Cell:
    """The arm on the last task that it runs on, at the first seed."""
    task = [task for task in suite.tasks if arm.runs_on(task)][-1]
    one = cell(suite, Point(suite.models[0], task, arm, arm.budgets[0]), None, suite.seeds[0])
    return replace(one, spec=replace(one.spec, model=str(model), lr=RATE))


def run(suite: Suite, model: Path, folder: Path) -> Iterator[tuple[Arm, Mapping[str, Any]]]:
    """Every arm that is not a cell of levers.yaml, too; and the first."""
    twice = {arm.name for arm in load_suite(SUITES / "levers.yaml").arms[1:]}
    for arm in suite.arms:
        if suite.name != "levers" and arm.name in twice:
            continue
        record = execute(small(suite, arm, model), folder / arm.name, threads=1)
        assert record is not None and record["status"] == "finished", record
        yield arm, record


@pytest.mark.parametrize("name", ["levers", "ablations"])
def test_every_arm_runs_and_does_something(name: str, tmp_path: Path, model: Path) -> None:
    suite = load_suite(SUITES / f"{name}.yaml")
    check_arms_differ(suite)
    assert all(arm.extends == suite.arms[0].name for arm in suite.arms[1:])
    losses = {}
    for arm, record in run(suite, model, tmp_path / "runs"):
        assert abs(record["flops"]["share"] - 0.3) < 0.1, arm.name
        losses[arm.name] = record["metrics"]["validation"]["loss"]
    first, *others = losses
    same = [arm for arm in others if losses[arm] == losses[first]]
    assert [arm for arm in same if arm not in NO_EFFECT_HERE] == []


def test_arms_of_the_same_name_are_the_same_cells() -> None:
    levers, ablations = (load_suite(SUITES / f"{name}.yaml") for name in ("levers", "ablations"))
    shared = {arm.name for arm in levers.arms} & {arm.name for arm in ablations.arms}
    assert len(shared) >= 4
    for task in levers.tasks:
        at = Point(levers.models[0], task, levers.arms[0], 0.3)
        for name in shared:
            keys = {
                cell(suite, at._replace(arm=arm), None, 0).key
                for suite in (levers, ablations)
                for arm in suite.arms
                if arm.name == name
            }
            assert len(keys) == 1, name
