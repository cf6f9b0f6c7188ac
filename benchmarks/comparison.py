"""Compare methods on tasks: equal epochs, each with its best learning rate of three, three seeds.

The learning rate is chosen on the validation split with the first seed; the other seeds run at that
rate. Every finished run is one line of the records; a second call runs only what is missing.

    python benchmarks/comparison.py --records benchmarks/records/comparison.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

METHODS = ("full", "rgft", "rgft-threshold", "random", "lora")
RATES = {"lora": (1e-3, 2e-3, 4e-3)}
DEFAULT_RATES = (1e-4, 2e-4, 4e-4)
SEEDS = (0, 1, 2)
KEPT = (
    "method",
    "task",
    "model",
    "seed",
    "lr",
    "epochs",
    "metric",
    "metrics",
    "seconds",
    "versions",
)
LOCK = Lock()


class Cell(NamedTuple):
    """One run of the comparison."""

    task: str
    method: str
    lr: float
    seed: int
    epochs: float


Done = dict[Cell, dict[str, Any]]


def read(path: Path) -> Done:
    """Finished cells. A line that a kill has torn is none, and said to be skipped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done: Done = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            print(f"{path}, line {number} is skipped: {error}", file=sys.stderr)
            continue
        done[Cell(*(record[name] for name in Cell._fields))] = record
    return done


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line, on a new one where a kill has torn the last."""
    with LOCK, path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        whole = file.read(1) in (b"", b"\n")
        file.write(b"" if whole else b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def run(cell: Cell, records: Path) -> None:
    """Run one cell in a process of its own and append its record."""
    task, method, lr, seed, epochs = cell
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rgft.cli", "train", "--task", task, "--method", method]
        command += ["--lr", str(lr), "--seed", str(seed), "--epochs", str(epochs)]
        command += ["--evaluations", "1", "--output-dir", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{cell}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads((Path(folder) / "run.json").read_text())
    record = {key: result[key] for key in KEPT} | {
        "budget": None,
        "flops": result["flops"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "command": result["command"],
        "code_revision": result["code_revision"],
        "hardware": result["hardware"],
    }
    append(records, record)
    score = record["metrics"]["validation"][record["metric"]]
    print(*cell, f"validation {score:.4f}", f"FLOPs {record['flops']['share']:.3f}", flush=True)


def run_all(cells: list[Cell], records: Path, workers: int) -> None:
    """Run the cells that have no record yet."""
    done = read(records)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda c: run(c, records), [c for c in cells if c not in done]))


def best_rate(done: Done, task: str, method: str, epochs: float) -> float:
    """The learning rate with the best validation score at the first seed."""

    def score(lr: float) -> float:
        record = done[Cell(task, method, lr, SEEDS[0], epochs)]
        return float(record["metrics"]["validation"][record["metric"]])

    return max(RATES.get(method, DEFAULT_RATES), key=score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["trec", "reviews"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    given.records.parent.mkdir(parents=True, exist_ok=True)
    epochs = given.epochs
    for task in given.tasks:
        sweep = [
            Cell(task, method, lr, SEEDS[0], epochs)
            for method in given.methods
            for lr in RATES.get(method, DEFAULT_RATES)
        ]
        run_all(sweep, given.records, given.workers)
        done = read(given.records)
        chosen = [
            Cell(task, method, best_rate(done, task, method, epochs), seed, epochs)
            for method in given.methods
            for seed in SEEDS[1:]
        ]
        run_all(chosen, given.records, given.workers)


if __name__ == "__main__":
    main()
