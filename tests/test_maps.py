"""Error maps of several runs, made by hand so that the answers are known."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from rgft.bench.maps import LEAST_COMPONENTS, all_tables, run_maps
from rgft.bench.maps.agreement import cosine, grouping, over_pairs, rank_correlation
from rgft.bench.maps.run_maps import profile
from rgft.bench.page import markdown, render
from rgft.bench.results import results
from rgft.cli import app

UP, DOWN = (1.0, 2.0, 3.0, 4.0, 5.0), (5.0, 4.0, 3.0, 2.0, 1.0)
Values = Sequence[float | None]


def record(task: str, arm: str, seed: int, start: Values, end: Values, **changed: Any) -> dict:
    names = [f"c{i}" for i in range(len(end))]
    course = {"course": [0.1, 1.0], "error": [list(start), list(end)]}
    return {
        **{"status": "finished", "task": task, "model": "m", "arm": arm, "seed": seed},
        **{"budget": 0.5, "rate": 1e-4, "rows": {"train": 9}, "epochs": 1.0, "extends": None},
        **{"metric": "accuracy", "metrics": {"validation": {"accuracy": 0.5}}},
        **{"flops": {"spent": 5.0, "full": 10.0, "share": 0.5}, "seconds": {"train": 2.0}},
        **{"error_map": {"components": names, "depths": list(range(len(names))), **course}},
        **{"key": f"{task} {arm} {seed}", **changed},
    }


def tables(records: Sequence[dict]) -> dict[str, list[list[str]]]:
    return {t.title: [list(row) for row in t.rows] for t in all_tables(results(records))}


def named(values: Sequence[float]) -> Mapping[str, float]:
    return {f"c{i}": value for i, value in enumerate(values)}


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, (2, 9)).astype(float)
    assert float(rank_correlation(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert float(cosine(x, y)) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert float(rank_correlation(np.ones(4), np.arange(4.0))) == 0


def test_interval_is_the_quantiles_of_all_resamples_of_components() -> None:
    maps = [(1.0, 2.0, 5.0, 3.0), (2.0, 1.0, 4.0, 3.0), (1.0, 3.0, 2.0, 9.0)]
    every = []
    for drawn in itertools.product(range(4), repeat=4):
        picked = [[one[i] for i in drawn] for one in maps]
        told = []
        for a, b in itertools.combinations(picked, 2):
            constant = len(set(a)) == 1 or len(set(b)) == 1
            told.append(0.0 if constant else stats.spearmanr(a, b).statistic)
        every.append(np.mean(told))
    found = over_pairs([named(one) for one in maps], rank_correlation)
    pairs = itertools.combinations(maps, 2)
    assert found.value == pytest.approx(
        np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
    )
    assert found[1:] == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.1)


def test_tasks_are_told_apart_as_often_as_all_assignments_say() -> None:
    rng = random.Random(0)
    maps, groups = [[rng.random() for _ in range(6)] for _ in range(5)], ["a", "a", "b", "b", "b"]

    def difference(labels: Sequence[str]) -> float:
        same: list[float] = []
        other: list[float] = []
        for (i, x), (j, y) in itertools.combinations(enumerate(maps), 2):
            (same if labels[i] == labels[j] else other).append(stats.spearmanr(x, y).statistic)
        return float(np.mean(same) - np.mean(other))

    every = [difference(labels) for labels in itertools.permutations(groups)]
    found = grouping([named(one) for one in maps], groups)
    assert found is not None
    assert found.within - found.between == pytest.approx(difference(groups))
    assert found.p == pytest.approx(np.mean([d >= difference(groups) - 1e-9 for d in every]))


def test_maps_that_depend_on_the_task_alone() -> None:
    records = [record("up", "full", s, UP, [v * (s + 1) for v in UP]) for s in range(3)]
    records += [record("down", "full", s, DOWN, DOWN) for s in range(3)]
    told = tables(records)
    assert [row[:5] for row in told["Error maps: other seeds"]] == [
        ["up", "full", "0.5", "3", "5"], ["down", "full", "0.5", "3", "5"],
    ]  # fmt: skip
    assert {row[5] for row in told["Error maps: other seeds"]} == {"1.00 [1.00, 1.00]"}
    # of 20 assignments of three to three, two split the tasks
    assert told["Error maps: the task in them"] == [
        ["m", "full", "0.5", "2", "6", "1.00", "-1.00", "0.1"]
    ]
    assert told["Error maps: pairs of tasks"] == [
        ["up", "down", "0.5", "-1.00", "-1.00 to -1.00", "9"]
    ]
    assert told["Error maps: after a tenth of the run"] == [
        ["m", "full", "0.5", "2", "6", "1.00 [1.00, 1.00]", "+2.00 [+2.00, +2.00]"]
    ]


def test_an_early_map_that_other_tasks_have_too_tells_nothing() -> None:
    records = [record(task, "full", s, UP, UP) for task in "ab" for s in range(2)]
    (row,) = tables(records)["Error maps: after a tenth of the run"]
    assert row[5:] == ["1.00 [1.00, 1.00]", "+0.00 [+0.00, +0.00]"]


def test_methods_are_paired_by_task_and_seed() -> None:
    ends = {0: UP, 1: DOWN}
    records = [record("t", "full", s, UP, end) for s, end in ends.items()]
    records += [record("t", "x", s, UP, end) for s, end in ends.items()]
    records += [record("t", "x", 2, UP, UP)]  # full has no such seed
    records += [record("t", "lever", s, UP, ends[1 - s], extends="x") for s in (0, 1)]
    records += [record("t", "wide", s, (*UP, 6.0), (*UP, 6.0)) for s in (0, 1)]
    records += [record("t", "wide", s, UP, (*UP[:4], None)) for s in (2, 3)]
    records += [record("t", "above", s, UP, UP, extends="wide") for s in range(4)]
    told = tables(records)["Error maps: other methods"]
    assert ["above", "wide", "0.5", "4 to 5", "1.00 [1.00, 1.00]", "1", "4"] in told
    assert ["x", "full", "0.5", "5", "1.00 [1.00, 1.00]", "1", "2"] in told
    assert ["lever", "x", "0.5", "5", "-1.00 [-1.00, -1.00]", "1", "2"] in told


def test_what_was_never_scored_and_what_was_recorded_late_is_left_out() -> None:
    frozen = [0.0, None, *UP]
    records = [record("t", "full", s, frozen, frozen) for s in (0, 1)]
    late = {"components": ["a"] * 5, "depths": [1] * 5, "course": [0.5, 1.0], "error": [UP, UP]}
    records += [record("t", "late", 0, UP, UP, error_map=late)]
    maps = run_maps(results(records))
    assert [len(m.end) for m in maps[:2]] == [5, 5] and maps[2].early is None
    assert tables(records)["Error maps: other seeds"][0][4] == "5"
    few = [record("t", "full", s, UP[:3], UP[:3]) for s in (0, 1)]
    assert tables(few) == {}


def test_the_profile_is_the_geometric_mean_of_shares() -> None:
    found = profile([named(UP), named(DOWN)])
    wanted = stats.gmean([np.array(UP) / sum(UP), np.array(DOWN) / sum(DOWN)], axis=0)
    assert list(found.values()) == pytest.approx(list(wanted))


def test_the_command_and_the_page_have_the_tables(tmp_path: Path) -> None:
    records = [record("t", "full", s, UP, UP) for s in (0, 1)]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    said = CliRunner().invoke(app, ["maps", str(file)])
    assert said.exit_code == 0 and "## Error maps: other seeds" in said.output
    assert "Error maps: other seeds" in render(records, "t")
    assert "## Error maps: other seeds" in markdown(records)
    tables = tmp_path / "maps.md"
    assert CliRunner().invoke(app, ["maps", str(file), "--markdown", str(tables)]).exit_code == 0
    assert tables.read_text(encoding="utf-8") == said.output
    short = record("t", "short", 0, UP[:3], UP[:3])
    file.write_text("".join(json.dumps(one) + "\n" for one in [*records, short]), encoding="utf-8")
    said = CliRunner().invoke(app, ["maps", str(file)])
    assert said.exit_code == 0 and "short" not in said.stdout
    assert said.stderr.startswith("rgft: note: 1 of 3 error maps are left out")
    assert said.stderr.endswith(": t short\n")
    apart = [record("t", "apart", 0, UP, [None, *UP[1:]])]
    apart += [record("t", "apart", 1, UP, [*UP[:-1], None])]
    text = markdown([*records, *apart])
    assert text.count("were scored in all their runs: t apart 0.5.") == 1
    late = {**records[0]["error_map"], "course": [0.5, 1.0]}
    file.write_text(json.dumps({**records[0], "error_map": late}) + "\n", encoding="utf-8")
    said = CliRunner().invoke(app, ["maps", str(file)], standalone_mode=False)
    assert "nothing to compare: 1 error maps" in str(said.exception)
    assert f"at least {LEAST_COMPONENTS} components" in str(said.exception)


# what tasks are like


def on_tasks(ends: Mapping[str, Values], gains: Mapping[str, float]) -> list[dict]:
    """Full fine-tuning and a tenth of it with `rgft`, whose surveys explain ever less."""
    made = []
    for i, (task, end) in enumerate(ends.items()):
        score = {"metrics": {"validation": {"accuracy": 0.5}}}
        made.append(record(task, "full", 0, end, end, budget=1.0, **score))
        ours = {"metrics": {"validation": {"accuracy": 0.5 + gains[task]}}}
        survey = {"survey": {"explained": [0.1, 0.9 - 0.1 * i, 0.2]}}
        made.append(record(task, "rgft", 0, end, end, budget=0.1, **ours, **survey))
    return made


SHAPES: Mapping[str, Values] = {
    "a": (4.0, 0.0, 0.0, 0.0),
    "trec": (3.0, 1.0, 0.0, 0.0),
    "b": (1.0, 1.0, 1.0, 1.0),
    "c": (0.0, 0.0, 1.0, 1.0),
    "d": (0.0, 0.0, 0.0, 2.0),
}


def test_traits_of_tasks_are_those_worked_out_by_hand() -> None:
    gains = {task: 0.01 * i for i, task in enumerate(SHAPES)}
    found = tables(on_tasks(SHAPES, gains))["Error maps: traits of tasks"]
    assert [row[0] for row in found] == list(SHAPES)
    assert [row[4] for row in found] == ["0.00", "0.08", "0.50", "0.83", "1.00"]
    assert [row[3] for row in found] == ["0.10", "0.20", "0.30", "0.40", "0.50"]
    assert [row[2] for row in found] == ["-", "6", "-", "-", "-"]
    assert [row[5] for row in found] == ["+0.0", "+1.0", "+2.0", "+3.0", "+4.0"]


def test_what_goes_with_traits_is_told_with_an_exact_p() -> None:
    gains = dict(zip(SHAPES, (0.0, 0.02, 0.01, 0.03, 0.04), strict=True))
    found = tables(on_tasks(SHAPES, gains))["Error maps: what goes with traits"]
    rows = {(row[0], row[1]): row[2:] for row in found}
    # of rows all tasks have 9, and classes are known of one alone: no row for either
    assert list(rows) == [
        ("centre of the map", "distance"),
        ("rgft less full", "distance"),
        ("rgft less full", "centre of the map"),
    ]
    orders = [list(order) for order in itertools.permutations(range(5))]
    whole = [abs(stats.spearmanr(order, range(5)).statistic) for order in orders]
    for (value, around, p, tasks), given, corrected in zip(
        rows.values(), (range(5), (0, 2, 1, 3, 4), (0, 2, 1, 3, 4)), (3, 2, 2), strict=True
    ):
        rho = stats.spearmanr(given, range(5)).statistic
        left = [
            stats.spearmanr([v for j, v in enumerate(given) if j != i], range(4)).statistic
            for i in range(5)
        ]
        exact = np.mean([one >= abs(rho) - 1e-9 for one in whole])
        assert value == f"{rho:+.2f}" and tasks == "5"
        assert around == f"{min(left):+.2f} to {max(left):+.2f}"
        assert float(p) == pytest.approx(min(1, corrected * exact), rel=0.05)


def test_of_four_tasks_nothing_is_said() -> None:
    four = {task: end for task, end in SHAPES.items() if task != "d"}
    found = tables(on_tasks(four, dict.fromkeys(four, 0.0)))
    assert "Error maps: what goes with traits" not in found
    assert len(found["Error maps: traits of tasks"]) == 4
