"""Tiny suites: models, data and the command, in a process that can be killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import tiny_run
from rgft.bench.cells import Cell, cell, points
from rgft.bench.suite import load_suite

TINY = Path(__file__).parent.parent / "benchmarks" / "suites" / "tiny.yaml"
ROWS = {"train": 32, "validation": 8, "test": 8}


def build(folder: Path, text: str | None = None) -> Path:
    """A suite beside a tiny model and small data; tiny.yaml unless another text is given."""
    tiny_run.build_model(folder / "model")
    tiny_run.build_data(folder / "data", rows=ROWS)
    suite = folder / "tiny.yaml"
    if text is None:
        shutil.copy(TINY, suite)
    else:
        suite.write_text(text, encoding="utf-8")
    return suite


def bench(suite: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    """`rgft bench` in a process of its own, from the suite's folder."""
    command = [sys.executable, "-m", "rgft.cli", "bench", str(suite), "--output-dir", str(output)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [*command, *options],
        env=environment,
        cwd=suite.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def whole(suite: Path, output: Path, *options: str) -> tuple[int, str, str]:
    """Run it to its end: exit code, standard output and error."""
    process = bench(suite, output, *options)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def first_cell(suite: Path) -> Cell:
    loaded = load_suite(suite)
    point = next(points(loaded))
    return cell(loaded, point, point.arm.rates[0], loaded.seeds[0])
