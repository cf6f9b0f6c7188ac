r"""Quality at equal FLOPs: `rgft` with a budget against controls with the same one.

Every finished run is one line of the records; a call runs only what is missing, so that the grid
can be filled in parts. A share of standard full fine-tuning (3 epochs, random batches of 32) is the
same number of FLOPs for every arm. Products are in bfloat16, for all arms.

    python benchmarks/budget_grid.py --records benchmarks/records/budget_grid.jsonl \
        --tasks trec cola --arms full rgft --budgets 0.3 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from comparison import KEPT, append

GROUPED = ("--group-by-length",)
SMALL = ("--batch-size", "8", *GROUPED)
ARMS: dict[str, tuple[str, ...]] = {
    "full": ("--method", "full"),  # with a budget: a schedule shortened to it
    "full-small": ("--method", "full", *SMALL),  # with all that makes steps cheap
    "full-small-tuned": ("--method", "full", *SMALL, "--balance", "0.5", "--adam-beta2", "0.98"),
    "full-small-cut": ("--method", "full", *SMALL, "--keep-layers", "5"),
    "lora": ("--method", "lora", "--batch-size", "16", *GROUPED),
    "suffix": ("--method", "suffix", "--batch-size", "16", *GROUPED),
    "random": ("--method", "random", "--batch-size", "16", *GROUPED),
    "auto-rgn": ("--method", "auto-rgn", "--batch-size", "16", *GROUPED),
    "rgft": ("--method", "rgft"),
}
RATES = {  # the first is where to start; None for the method's own
    "full": (1e-4, 2e-4, 5e-5),
    "full-small": (1e-4, 2e-4, 5e-5),
    "full-small-tuned": (1e-4, 2e-4, 5e-5),
    "full-small-cut": (1e-4, 2e-4, 5e-5),
    "lora": (2e-3, 1e-3, 4e-3),
    "suffix": (4e-4, 2e-4, 8e-4),
    "random": (2e-4, 1e-4, 4e-4),
    "auto-rgn": (2e-4, 1e-4, 4e-4),
    "rgft": (None,),
}
ADDED = ("batch_size", "layers", "survey", "visits", "prefix_cache", "flops", "peak_memory_bytes")


class Cell(NamedTuple):
    """One run of the grid."""

    task: str
    arm: str
    budget: float
    rate: float | None
    seed: int
    rows: int | None = None  # of the training split; None for all


def command(cell: Cell, folder: str) -> list[str]:
    """What runs a cell; a budget of 1 is none."""
    parts = [sys.executable, "-m", "rgft.cli", "train", "--task", cell.task, *ARMS[cell.arm]]
    parts += ["--seed", str(cell.seed), "--evaluations", "1", "--precision", "bfloat16"]
    if cell.rows is not None:
        parts += ["--max-train-rows", str(cell.rows)]
    if cell.budget < 1:
        parts += ["--budget", str(cell.budget)]
    if cell.rate is not None:
        parts += ["--lr", str(cell.rate)]
    return [*parts, "--output-dir", folder]


def read(path: Path) -> dict[Cell, dict[str, Any]]:
    """Finished cells."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {Cell(**record["cell"]): record for record in records}


def run(cell: Cell, records: Path) -> None:
    """Run one cell in a process of its own and append its record."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command(cell, folder), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(cell, done.stderr.strip().splitlines()[-1], file=sys.stderr, flush=True)
            return
        result = json.loads((Path(folder) / "run.json").read_text())
    kept = {key: result[key] for key in (*KEPT, *ADDED, "command", "code_revision", "hardware")}
    append(records, {"cell": cell._asdict(), "budget": cell.budget, **kept})
    scores = {split: round(100 * m[result["metric"]], 1) for split, m in result["metrics"].items()}
    share, seconds = result["flops"]["share"], result["seconds"]["train"]
    print(*cell, scores, f"share {share:.3f}", f"{seconds:.0f} s", flush=True)


def table(done: dict[Cell, dict[str, Any]]) -> str:
    """Markdown: for each task the arms by budget, each at the rate that is best on validation."""
    groups: dict[tuple[str, int, float, str], dict[float | None, list[dict[str, Any]]]] = {}
    for cell, record in done.items():
        rates = groups.setdefault((cell.task, cell.rows or 0, cell.budget, cell.arm), {})
        rates.setdefault(cell.rate, []).append(record)
    lines = [
        "| task | rows | budget | arm | rate | seeds | validation | test | FLOPs, share of full |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(ARMS)
    for key in sorted(groups, key=lambda k: (k[0], k[1], -k[2], order.index(k[3]))):
        (task, rows, budget, arm), rates = key, groups[key]
        rate, runs = max(rates.items(), key=lambda item: _mean(item[1]))
        scores = " | ".join(_shown(runs, split) for split in ("validation", "test"))
        share = statistics.mean(run["flops"]["share"] for run in runs)
        shown = "own" if rate is None else f"{rate:g}"
        lines.append(
            f"| {task} | {rows or 'all'} | {budget:g} | `{arm}` | {shown} | {len(runs)} | {scores} "
            f"| {share:.3f} |"
        )
    return "\n".join(lines)


def _scores(runs: list[dict[str, Any]], split: str) -> list[float]:
    return [100 * run["metrics"][split][run["metric"]] for run in runs if split in run["metrics"]]


def _mean(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(_scores(runs, "validation"))


def _shown(runs: list[dict[str, Any]], split: str) -> str:
    """Mean and, of several seeds, standard deviation."""
    scores = _scores(runs, split)
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["trec", "sst2", "cola", "rte", "reviews"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="training rows of each task; all by default")
    parser.add_argument("--rates", type=int, default=1, help="how many of each arm's rates")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    done = read(given.records)
    cells = [
        Cell(task, arm, budget, rate, seed, given.rows)
        for seed in given.seeds
        for budget in given.budgets
        for arm in given.arms
        for task in given.tasks
        for rate in RATES[arm][: given.rates]
    ]
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(lambda c: run(c, given.records), [c for c in cells if c not in done]))


if __name__ == "__main__":
    main()
