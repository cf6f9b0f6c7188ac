"""What the commands print: whole names, wherever it goes."""

from __future__ import annotations

import io
import json
import re
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from rgft.cli import summary
from rgft.inspection import inspect_model
from rgft.tasks import TASKS
from runs import call


def cells(printed: str) -> list[list[str]]:
    """The cells of a table's lines."""
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("granularity", ["block", "head"])
def test_component_names_are_whole_without_a_terminal(
    granularity: str,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    given = ["--model", str(tiny_model), "--granularity", granularity]
    assert call(monkeypatch, "inspect", *given) == 0
    rows = cells(capsys.readouterr().out)
    expected = inspect_model(str(tiny_model), granularity)
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (row["name"], row["kind"], str(row["depth"])) for row in expected
    ]


def test_seconds_of_components(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock to which every step is half a second."""
    clock = partial(next, count(0.0, 0.5))
    monkeypatch.setattr("rgft.inspection.inspect_model", partial(inspect_model, clock=clock))
    given = ["--model", str(tiny_model), "--granularity", "layer", "--seconds"]
    assert call(monkeypatch, "inspect", *given) == 0
    printed = capsys.readouterr().out
    assert [row[6:] for row in cells(printed)] == [["0.5", "0.5"]] * len(cells(printed))
    assert "(32 texts of 64 tokens, or 32 images) on this machine, 0.5 for full" in printed
    assert "off by 0% on those" in printed
    assert call(monkeypatch, "inspect", *given, "--json") == 0
    for row in json.loads(capsys.readouterr().out):
        seconds = [row[f"seconds_{what}"] for what in ("alone", "down_to", "full")]
        assert seconds == pytest.approx([0.5] * 3)
    assert call(monkeypatch, "inspect", "--model", str(tiny_model), "--json") == 0
    assert "seconds" not in capsys.readouterr().out


def test_component_names_are_folded_on_a_narrow_terminal(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call(monkeypatch, "inspect", "--model", str(tiny_model), "--granularity", "head") == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line.startswith("│")) <= 70
    names = [row["name"] for row in inspect_model(str(tiny_model), "head")]
    assert "".join(row[0] for row in cells(printed)) == "".join(names)


def test_a_summary_of_a_run_without_peak_memory() -> None:
    record = {
        **{"method": "rgft", "task": "mine", "model": "minilm", "metrics": {}},
        **{"flops": {"spent": 1.0, "share": 0.5}, "seconds": {"train": 2.0, "overhead": 0.1}},
        **{"parameters": {"total": 4, "updated_per_step": {"mean": 2.0}}},
        "peak_memory_bytes": None,
    }
    console = Console(file=io.StringIO())
    console.print(summary(record))
    assert re.search(r"peak memory\s*│ not known", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_summary_of_a_run_that_found_its_budget() -> None:
    stages = [{"share": 0.1, "validation": 0.81}, {"share": 0.2, "validation": 0.8}]
    record = {
        **{"method": "rgft", "task": "mine", "model": "minilm", "metrics": {}},
        **{"flops": {"spent": 1.0, "share": 0.2}, "seconds": {"train": 2.0, "overhead": 0.1}},
        **{"parameters": {"total": 4, "updated_per_step": {"mean": 2.0}}},
        **{"peak_memory_bytes": None, "budget_auto": {"stages": stages, "chosen": 0}},
    }
    console = Console(file=io.StringIO())
    console.print(summary(record))
    assert re.search(r"stages\s*│ 10% 0.81 \(kept\), 20% 0.8 ", console.file.getvalue())  # type: ignore[attr-defined]


def test_tasks_and_where_they_lie_are_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert call(monkeypatch, "data") == 0
    rows = cells(capsys.readouterr().out)
    assert [(row[0], row[3], row[4]) for row in rows] == [
        (name, task.description, task.origin) for name, task in TASKS.items()
    ]


@pytest.mark.parametrize(
    ("given", "known"),
    [("--rows", "--max-train-rows"), ("--learning-rate", "--lr"), ("--arm", "--method")],
)
def test_an_option_by_its_name_in_suites(
    given: str, known: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", given, "5") == 2
    assert f"No such option '{given}'. Did you mean '{known}'?" in capsys.readouterr().err
    assert call(monkeypatch, "bench", given, "5") == 2  # which has no such option by any name
    assert known not in capsys.readouterr().err


def test_damaged_arguments_are_told_with_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = {"schema": 1, "status": "interrupted", "arguments": {"task": "trec", "what": 1}}
    (tmp_path / "run.json").write_text(json.dumps(damaged))
    assert call(monkeypatch, "train", "--resume", "--output-dir", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run.json'} is damaged: its arguments are not those of a run" in said
    assert said.count("\n") == 1


def test_a_folder_without_data_is_told_before_a_packaged_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unpack() -> Path:
        raise AssertionError("unpacked")

    monkeypatch.setattr("rgft.models.PACKAGED", {"minilm": unpack})
    given = ["--data", str(tmp_path / "none"), "--output-dir", str(tmp_path / "run")]
    assert call(monkeypatch, "train", *given) == 2
    assert f"data folder {tmp_path / 'none'} does not exist" in capsys.readouterr().err
