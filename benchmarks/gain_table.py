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
    """Points of the headline metric that putting a component back costs."""
    names = [
        part["name"].removeprefix("bert.encoder.")
        for part in next(iter(by_task.values()))[0]["components"]
    ]
    lines = [_line(["task", *names]), _line(["---"] * (1 + len(names)))]
    for task, runs in by_task.items():
        columns = zip(
            *([100 * part["gain"] for part in run["components"]] for run in runs), strict=True
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
    pairs = [(part["gain"], part[what]) for part in run["components"] if part[what] is not None]
    return float(rank_correlation(*np.array(pairs).T))


def _spread(values: tuple[float, ...]) -> str:
    around = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{around}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
