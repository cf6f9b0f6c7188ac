"""The page of what works where is up to date, and every test that it names exists."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
