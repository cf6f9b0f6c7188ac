"""The page of what works where is up to date, and every test that it names exists."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"(tests/\w+\.py)::(\w+)")
LOOPS = {"Trainer", "Accelerate", "Lightning", "plain loop"}
TRAINERS = {"TRL SFTTrainer", "TRL SFTTrainer with LoRA", "TRL DPOTrainer", "sentence-transformers"}
FEATURES = {  # answered for all of them
    *("accumulation", "clipping", "bf16", "fp16 with gradient scaling", "compiled blocks"),
    *("gradient checkpointing", "reentrant checkpointing, where plans freeze"),
    *("LoRA", "DoRA", "rsLoRA", "several adapters", "quantised frozen base"),
    *("prefix cache", "residual ledger", "budget", "budget auto"),
    *("resume", "checkpoint written without rgft", "checkpoint read without rgft"),
    *("several processes (DDP)", "several processes (FSDP2)", "resume in several processes"),
}
ALONE = {  # of one framework's own, or of one of its options
    "MLflow",
    "schedule-free AdamW",
    "schedule-free AdamW, resume",
    "schedule-free AdamW without split groups",
    "TensorBoard",
    "W&B",
    "Trackio",
    "accumulation of models that ignore num_items_in_batch",
    "residual ledger, resume",
    "residual ledger, data without sample_ids",
    "residual ledger in several processes",
    "prefix cache in several processes",
}


def test_every_cell_is_a_test_that_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    matrix = importlib.import_module("matrix")
    named = {cell["test"] for cell in matrix.cells() if "test" in cell}
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    collected = done.stdout.splitlines()
    # without brackets a test stands for all its cases
    known = {*collected, *(test.partition("[")[0] for test in collected)}
    assert len(named) > 20
    assert named - known == set(), done.stderr


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    matrix = importlib.import_module("matrix")
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(), "run python docs/matrix.py"


def test_a_feature_of_one_loop_is_answered_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    matrix = importlib.import_module("matrix")
    columns: dict[str, set[str]] = {}
    for cell in matrix.cells():
        columns.setdefault(cell["row"], set()).add(cell["column"])
    for loops in (LOOPS, TRAINERS):
        for column in FEATURES | set.union(*(columns[row] for row in loops)) - ALONE:
            assert {row for row in loops if column in columns[row]} == loops, column


def test_no_cell_of_a_loop_is_answered_twice_or_refused_without_a_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    matrix = importlib.import_module("matrix")
    ours = [cell for cell in matrix.cells() if cell["row"] in LOOPS | TRAINERS]
    assert len({(cell["row"], cell["column"]) for cell in ours}) == len(ours)
    for cell in ours:
        assert "refused" not in cell or NAMED.search(cell["refused"]), cell


def test_a_test_that_a_refusal_names_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    matrix = importlib.import_module("matrix")
    reasons = [cell.get("refused") or cell.get("not_applicable") or "" for cell in matrix.cells()]
    named = {found for reason in reasons for found in NAMED.findall(reason)}
    assert len(named) > 10
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (path, test)
