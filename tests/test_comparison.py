"""The comparison's records: what is done, what a kill has torn, and the tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("comparison")


def record(task: str = "trec", epochs: float = 1.0, **changed: Any) -> dict[str, Any]:
    splits = {"validation": {"accuracy": 0.5}, "test": {"accuracy": 0.25}}
    return {
        **{"task": task, "method": "full", "lr": 1e-4, "seed": 0, "epochs": epochs},
        **{"metric": "accuracy", "metrics": splits, "flops": {"share": 1.0}},
        **changed,
    }


def test_other_epochs_are_another_cell(comparison: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert comparison.read(path) == {}
    comparison.append(path, record(epochs=0.5))
    assert comparison.Cell("trec", "full", 1e-4, 0, 0.5) in comparison.read(path)
    assert comparison.Cell("trec", "full", 1e-4, 0, 1.0) not in comparison.read(path)


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_torn_last_line_is_no_cell_and_harms_none(
    cut: int, comparison: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    comparison.append(path, record())
    path.write_text(path.read_text() + json.dumps(record(seed=1))[:cut])
    torn = path.read_text()
    assert [cell.seed for cell in comparison.read(path)] == [0]
    assert "line 2 is skipped" in capsys.readouterr().err
    comparison.append(path, record(seed=2))
    assert [cell.seed for cell in comparison.read(path)] == [0, 2]
    assert path.read_text().startswith(torn + "\n")


def test_line_without_its_end_of_line_counts(comparison: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record()))
    comparison.append(path, record(seed=1))
    assert [cell.seed for cell in comparison.read(path)] == [0, 1]


def test_tables_keep_lengths_apart(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RECORDS", tmp_path / "records.jsonl")
    for task, epochs, good in (("trec", 1.0, 2e-4), ("reviews", 0.5, 1e-4), ("trec", 2.0, 4e-4)):
        for rate in comparison.DEFAULT_RATES:
            for seed in comparison.SEEDS:
                score = 0.9 if rate == good else 0.5
                splits = {split: {"accuracy": score} for split in ("validation", "test")}
                row = record(task, epochs, lr=rate, seed=seed, metrics=splits)
                comparison.append(tables.RECORDS, row)
    captions = [line for line in tables.table().splitlines() if ":" in line]
    rows = [line for line in tables.table().splitlines() if line.startswith("| `full`")]
    assert [c.partition(",")[0] for c in captions if c[0] != "|"] == [
        "trec: accuracy x 100 after 1 epoch",
        "reviews: accuracy x 100 after 0.5 epoch",
        "trec: accuracy x 100 after 2 epochs",
    ]
    assert [row.split(" | ")[1] for row in rows] == ["0.0002", "0.0001", "0.0004"]
