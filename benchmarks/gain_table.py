"""Markdown of the records that benchmarks/gain.py makes."""

from __future__ import annotations

import math
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
    """Points of the headline metric, and loss, that putting components back costs."""
    first = next(iter(by_task.values()))[0]["components"]
    names = [part["name"].removeprefix("bert.encoder.") for part in first]
    lines = [_line(["task", "put back", *names]), _line(["---"] * (2 + len(names)))]
    for task, runs in by_task.items():
        metric = runs[0]["metric"]
        for what, key, measure, scale, digits in (
            ("it alone: points", "alone", metric, 100, 1),
            ("it alone: loss", "alone", "loss", 1, 3),
            ("it and all below: points", "below", metric, 100, 1),
            ("it and all below: loss", "below", "loss", 1, 3),
        ):
            columns = zip(
                *([scale * part[key][measure] for part in run["components"]] for run in runs),
                strict=True,
            )
            lines.append(_line([task, what, *(_spread(column, digits) for column in columns)]))
    return "\n".join(lines)


def correlations(by_task: dict[str, list[Row]]) -> str:
    """Rank correlation over components of what each adds, with all below it, and each of `WITH`."""
    found = {
        what: {task: [_related(run, what) for run in runs] for task, runs in by_task.items()}
        for what in WITH
    }
    header = ["points that it adds to those below, and", *by_task, "all tasks", "95% interval"]
    lines = [_line(header), _line(["---"] * len(header))]
    for what, values in found.items():
        groups = list(values.values())
        mean = statistics.fmean(map(statistics.fmean, groups))
        low, high = interval(groups)
        told = [f"{statistics.fmean(group):+.2f}" for group in groups]
        around = "-" if math.isnan(low) else f"[{low:+.2f}, {high:+.2f}]"
        lines.append(_line([WITH[what], *told, f"{mean:+.2f}", around]))
    return "\n".join(lines)


def _related(run: Row, what: str) -> float:
    below = [part["below"][run["metric"]] for part in run["components"]]
    added = np.diff(below, prepend=0.0)
    pairs = [
        (gain, part[what])
        for gain, part in zip(added, run["components"], strict=True)
        if part[what] is not None
    ]
    return float(rank_correlation(*np.array(pairs).T))


def _spread(values: tuple[float, ...], digits: int) -> str:
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{around}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
