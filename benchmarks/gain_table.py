"""Markdown of the records that benchmarks/gain.py makes."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from rgft.bench.maps.agreement import rank_correlation
from rgft.bench.statistics import interval

WITH = {
    "early": "map after a tenth",
    "end": "map at the end",
    "moved": "how far it moved",
    "depth": "depth",
}
Row = dict[str, Any]


def page(rows: list[Row]) -> str:
    """Where the gain is, and what tells it."""
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return f"{gains(by_task)}\n\n{correlations(by_task)}"


def gains(by_task: dict[str, list[Row]]) -> str:
    """Loss that putting a component back costs, in thousandths."""
    names = [
        part["name"].removeprefix("bert.encoder.")
        for part in next(iter(by_task.values()))[0]["components"]
    ]
    lines = [_line(["task", *names]), _line(["---"] * (1 + len(names)))]
    for task, runs in by_task.items():
        columns = zip(
            *([1000 * part["gain"] for part in run["components"]] for run in runs), strict=True
        )
        lines.append(_line([task, *(_spread(column) for column in columns)]))
    return "\n".join(lines)


def correlations(by_task: dict[str, list[Row]]) -> str:
    """Rank correlation over components of the gain with each of `WITH`; and over all tasks."""
    found = {
        what: {task: [_related(run, what) for run in runs] for task, runs in by_task.items()}
        for what in WITH
    }
    header = ["gain and", *by_task, "all tasks", "95% interval"]
    lines = [_line(header), _line(["---"] * len(header))]
    for what, values in found.items():
        groups = list(values.values())
        mean = statistics.fmean(map(statistics.fmean, groups))
        low, high = interval(groups)
        told = [f"{statistics.fmean(group):+.2f}" for group in groups]
        lines.append(_line([WITH[what], *told, f"{mean:+.2f}", f"[{low:+.2f}, {high:+.2f}]"]))
    return "\n".join(lines)


def _related(run: Row, what: str) -> float:
    sides = ([part[name] for part in run["components"]] for name in ("gain", what))
    return float(rank_correlation(*map(np.array, sides)))


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.fmean(values):.0f} ± {statistics.stdev(values):.0f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
