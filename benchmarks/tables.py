"""Fill the tables in README and the documentation from the records; no number is typed by hand.

python benchmarks/tables.py          # write
python benchmarks/tables.py --check  # fail if README is not what the records say
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import budget_grid
import llm
import llm_table
from budget_grid import read as grid
from comparison import METHODS, SEEDS, Cell, Done, best_rate, read

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records" / "comparison.jsonl"
BEGIN, END = "<!-- comparison:begin -->", "<!-- comparison:end -->"
GRID = ROOT / "benchmarks" / "records" / "budget_grid.jsonl"
LLM = ROOT / "benchmarks" / "records" / "llm.jsonl"
LLM_BEGIN, LLM_END = "<!-- llm:begin -->", "<!-- llm:end -->"
GRID_BEGIN, GRID_END = "<!-- grid:begin -->", "<!-- grid:end -->"


def rows(task: str, epochs: float, done: Done) -> list[str]:
    """One line a method whose cells are all there: quality over the seeds, and FLOPs."""
    lines = []
    for method in METHODS:
        try:
            rate = best_rate(done, task, method, epochs)
            runs = [done[Cell(task, method, rate, seed, epochs)] for seed in SEEDS]
        except KeyError:
            continue
        scores = {
            split: [100 * run["metrics"][split][run["metric"]] for run in runs]
            for split in ("validation", "test")
        }
        quality = " | ".join(
            f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            for values in scores.values()
        )
        share = statistics.mean(run["flops"]["share"] for run in runs)
        lines.append(f"| `{method}` | {rate:g} | {quality} | {share:.3f} |")
    return lines


def table() -> str:
    """Markdown for all tasks and lengths that have records."""
    done = read(RECORDS)
    parts = []
    for task, epochs in dict.fromkeys((cell.task, cell.epochs) for cell in done):
        lines = rows(task, epochs, done)
        if lines:
            metric = next(record["metric"] for cell, record in done.items() if cell.task == task)
            caption = (
                f"{task}: {metric} x 100 after {epochs:g} epoch{'s' * (epochs > 1)}, mean ± "
                f"standard deviation of {len(SEEDS)} seeds"
            )
            header = f"| {task} | learning rate | validation | test | FLOPs, share of full |"
            parts.append("\n".join([caption, "", header, "|---|---|---|---|---|", *lines]))
    return "\n\n".join(parts)


def filled(text: str, begin: str, end: str, content: str) -> str:
    """A page with what stands between two marks replaced."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages = {
        ROOT / "README.md": (BEGIN, END, table()),
        ROOT / "docs" / "budget.md": (GRID_BEGIN, GRID_END, budget_grid.table(grid(GRID))),
        ROOT / "docs" / "integrations" / "llm.md": (
            LLM_BEGIN,
            LLM_END,
            llm_table.page(llm.read(LLM)),
        ),
    }
    for path, (begin, end, content) in pages.items():
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, begin, end, content)
        if not check:
            path.write_text(wanted, encoding="utf-8")
        elif wanted != text:
            sys.exit(f"{path.name} differs from the records: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
