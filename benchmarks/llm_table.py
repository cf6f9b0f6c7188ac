"""Markdown of the records that benchmarks/llm.py makes, as in docs/integrations/llm.md.

What has no record is named, and so is a rate that another might have beaten.
"""

from __future__ import annotations

import statistics
from typing import Any

from llm import RATES, SHAPES, SWEEP_STEPS, Cell, best_rate

EVERY = 30  # steps that a point of the curves averages over
Row = dict[str, Any]
NAMES = {"gsm8k": "GSM8K", "scitldr": "SciTLDR"}


def summary(runs: list[Row]) -> str:
    """One line a method."""
    lines = [
        "| method | rate | held-out loss | TFLOP | of full | processor | wall | guide | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        loss, seconds, flops = run["metrics"]["test"], run["seconds"], run["flops"]
        lines.append(
            f"| `{run['method']}` | {run['lr']:g} | {loss['before']:.3f} to {loss['loss']:.3f} "
            f"| {flops['spent'] / 1e12:.1f} | {flops['share']:.3f} "
            f"| {seconds['processor'] / 60:.1f} min | {seconds['train'] / 60:.1f} min "
            f"| {seconds['overhead']:.1f} s | {run['peak_memory_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def curves(runs: list[Row]) -> str:
    """Training loss, with FLOPs and processor time, after every so many steps."""
    ends = range(EVERY, runs[0]["steps"] + 1, EVERY)
    lines = [
        "| method | " + " | ".join(f"steps {end - EVERY + 1} to {end}" for end in ends) + " |",
        "|" + "---|" * (1 + len(ends)),
    ]
    for run in runs:
        cells = []
        for end in ends:
            part = run["curve"][end - EVERY : end]
            loss = statistics.mean(point["loss"] for point in part)
            spent, busy = part[-1]["flops"] / 1e12, part[-1]["processor"]
            cells.append(f"{loss:.3f} ({spent:.1f} TFLOP, {busy:.0f} s)")
        lines.append(f"| `{run['method']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def answers(runs: list[Row]) -> str:
    """What the models say to one held-out prompt."""
    first = runs[0]["generation"]
    parts = ["One held-out prompt, answered greedily:", _quoted("prompt", first["prompt"])]
    parts.append(_quoted("before", first["before"]))
    parts += [_quoted(f"after `{run['method']}`", run["generation"]["after"]) for run in runs]
    differences = {
        run["method"]: run["generation"]["largest_difference_of_merged_logits"] for run in runs
    }
    said = [f"`{name}` {value:.0e}" for name, value in differences.items() if value is not None]
    if said:
        parts.append(f"Logits of the merged model differ by at most: {', '.join(said)}.")
    return "\n\n".join(parts)


def sweep(done: dict[Cell, Row]) -> str:
    """Held-out losses that the rates were chosen by."""
    lines = ["| method | rate | loss on held-out rows of GSM8K |", "|---|---|---|"]
    for cell, record in sorted(done.items()):
        if cell.kind == "sweep":
            loss = record["metrics"]["validation"]["loss"]
            lines.append(f"| `{cell.method}` | {cell.lr:g} | {loss:.3f} |")
    return "\n".join(lines)


def edges(done: dict[Cell, Row]) -> str:
    """Which methods took the smallest or the largest rate that they were tried at."""
    told = []
    for method, rates in RATES.items():
        if {cell.lr for cell in done if (cell.kind, cell.method) == ("sweep", method)} == {*rates}:
            best = best_rate(done, method)
            told += [f"`{method}` ({best:g}, the largest)"] if best == max(rates) else []
            told += [f"`{method}` ({best:g}, the smallest)"] if best == min(rates) else []
    if not told:
        return ""
    return f"At the edge of its sweep, so that a rate beyond may be better: {', '.join(told)}."


def missing(done: dict[Cell, Row]) -> str:
    """Which cells of the benchmark have no record."""
    have = {(cell.kind, cell.task, cell.method, cell.lr) for cell in done}
    told = []
    for method, rates in RATES.items():
        left = [f"{rate:g}" for rate in rates if ("sweep", "gsm8k", method, rate) not in have]
        told += [f"`{method}` at {' and '.join(left)} for the choice of the rate"] if left else []
    for task in SHAPES:
        ran = {cell.method for cell in done if (cell.kind, cell.task) == ("main", task)}
        left = [f"`{method}`" for method in RATES if method not in ran]
        told += [f"{', '.join(left)} on {NAMES[task]}"] if left else []
    return f"Without a record so far: {'; '.join(told)}." if told else ""


def page(done: dict[Cell, Row]) -> str:
    """All of it, tasks that have records alone."""
    if not done:
        return "There are no records yet."
    parts = [one for one in (missing(done), edges(done)) if one]
    parts += [f"Choice of the rate, after {SWEEP_STEPS} steps:", sweep(done)]
    for task, name in NAMES.items():
        runs = [r for cell, r in done.items() if cell.kind == "main" and cell.task == task]
        if runs:
            parts += [f"### {name}", summary(runs), curves(runs), answers(runs)]
    return "\n\n".join(parts)


def _quoted(title: str, text: str) -> str:
    return f"*{title}*\n\n```text\n{text.strip()}\n```"
