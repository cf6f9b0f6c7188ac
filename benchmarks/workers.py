"""Throughput of `rgft bench` with two workers, as a ratio to that with one.

The same suite runs into a fresh folder with one worker and with two, in turns, so that noise of the
machine falls on both. What is timed is the whole command, from its start to its end, as a user
waits for it. On a machine that others use the ratio says as much about them: the load before each
run is in the record.

    python benchmarks/workers.py --record benchmarks/records/workers.json
    python benchmarks/workers.py --suite SUITE.yaml --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from invocation import invocation

from rgft import records
from rgft.atomic import write_text_atomically
from rgft.bench.journal import FILE, read_records

SUITE = """
models: [minilm]
tasks: [trec]
seeds: [0, 1, 2, 3]
rates: [1.0e-4]
rows: 400
options: {epochs: 1, evaluations: 1, max_evaluation_rows: 100}
arms:
  full: {}
"""


def measured(suite: Path, folder: Path, workers: int) -> dict[str, Any]:
    """One run of the whole suite: seconds, cells, and the load of the machine before."""
    command = [sys.executable, "-m", "rgft.cli", "bench", str(suite), "--output-dir", str(folder)]
    load = os.getloadavg()[0]
    started = time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    cells = len(read_records(folder / FILE))
    print(f"{workers} workers: {cells} cells in {seconds:.1f} s, load {load:.1f}", flush=True)
    return {"workers": workers, "cells": cells, "seconds": seconds, "load_before": load}


def ratio(runs: list[dict[str, Any]]) -> float:
    """Cells a second with two workers over those with one, each by its mean over rounds."""
    means = {
        workers: statistics.fmean(
            run["cells"] / run["seconds"] for run in runs if run["workers"] == workers
        )
        for workers in (1, 2)
    }
    return means[2] / means[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, help="another suite than MiniLM on 400 rows of TREC")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    given = parser.parse_args()
    record: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": invocation(__file__, "--record", "--suite"),
        "suite": SUITE if given.suite is None else given.suite.read_text(encoding="utf-8"),
    }
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        suite = given.suite or Path(scratch, "suite.yaml")
        if given.suite is None:
            suite.write_text(SUITE, encoding="utf-8")
        for turn in range(given.rounds):
            for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                runs.append(measured(suite, Path(scratch, f"{turn}-{workers}"), workers))
    record |= {"runs": runs, "ratio": ratio(runs), "cores": os.cpu_count()}
    print(f"two workers against one: {record['ratio']:.2f} times the cells a second")
    if given.record is not None:
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
