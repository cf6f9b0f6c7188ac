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
from typing import Any

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

Cell = tuple[str, str, float, int]  # task, method, learning rate, seed


def cell_of(record: dict[str, Any]) -> Cell:
    """What a record is of."""
    return record["task"], record["method"], record["lr"], record["seed"]


def read(path: Path) -> dict[Cell, dict[str, Any]]:
    """Finished cells."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {cell_of(r): r for r in map(json.loads, lines)}


def run(cell: Cell, epochs: float, records: Path) -> None:
    """Run one cell in a process of its own and append its record."""
    task, method, lr, seed = cell
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
    with LOCK, records.open("a") as file:
        file.write(json.dumps(record) + "\n")
    score = record["metrics"]["validation"][record["metric"]]
    print(*cell, f"validation {score:.4f}", f"FLOPs {record['flops']['share']:.3f}", flush=True)


def run_all(cells: list[Cell], epochs: float, records: Path, workers: int) -> None:
    """Run the cells that have no record yet."""
    done = read(records)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda c: run(c, epochs, records), [c for c in cells if c not in done]))


def best_rate(done: dict[Cell, dict[str, Any]], task: str, method: str) -> float:
    """The learning rate with the best validation score at the first seed."""

    def score(lr: float) -> float:
        record = done[task, method, lr, SEEDS[0]]
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
    for task in given.tasks:
        sweep = [
            (task, m, lr, SEEDS[0]) for m in given.methods for lr in RATES.get(m, DEFAULT_RATES)
        ]
        run_all(sweep, given.epochs, given.records, given.workers)
        done = read(given.records)
        chosen = [(task, m, best_rate(done, task, m), s) for m in given.methods for s in SEEDS[1:]]
        run_all(chosen, given.epochs, given.records, given.workers)


if __name__ == "__main__":
    main()
