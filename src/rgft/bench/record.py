"""From the folder of a run to one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rgft.errors import InputError
from rgft.records import read_run
from rgft.report.grid import load_grid

KEPT = (
    *("method", "seed", "lr", "epochs", "batch_size", "adam_beta2", "dropout", "layers", "survey"),
    *("rows", "config", "idle"),
    *("metric", "metrics", "chance", "flops", "seconds", "visits", "prefix_cache"),
    *("peak_memory_bytes", "forgetting"),
    *("versions", "hardware", "resumed", "command", "code_revision", "started", "finished"),
)
MAP_POINTS = 10  # of the run's course
MAP_COMPONENTS = 256
DIGITS = 5


def record_of_run(folder: Path) -> dict[str, Any]:
    """What a finished run's folder says, without what only its own page needs.

    Raises:
        InputError: The folder holds no run, or a damaged one.
    """
    run = read_run(folder)
    record = {name: run[name] for name in KEPT if name in run}
    lost = [name for name in ("parameters", "history", "metric") if name not in run]
    if lost:
        raise InputError(f"the record of the run in {folder} has no {lost[0]!r}: leave it out")
    parameters = run["parameters"]
    record["parameters"] = {
        "total": parameters["total"],
        "updated_per_step": parameters["updated_per_step"]["mean"],
    }
    record["history"] = [
        {
            "flops": p["flops"],
            "seconds": p["seconds"],
            **{run["metric"]: p["validation"].get(run["metric"])},
        }
        for p in run["history"]
    ]
    record["error_map"] = error_map(folder / "error_map.parquet")
    return record


def error_map(path: Path) -> dict[str, Any] | None:
    """The map at ten points of the run's course; None without one, or of very many components.

    "error" is [points][components], in the order of "components"; null where nothing was recorded.
    """
    grid = load_grid(path)
    if grid is None or len(grid.names) > MAP_COMPONENTS:
        return None
    last = grid.steps[-1]
    wanted = last * np.arange(1, MAP_POINTS + 1) / MAP_POINTS
    columns = np.unique(np.searchsorted(grid.steps, wanted).clip(max=len(grid.steps) - 1))
    return {
        "components": list(grid.names),
        "depths": list(grid.depths),
        "course": [round(float(grid.steps[c] / last), DIGITS) for c in columns],
        "error": [[_short(value) for value in grid.error[:, c]] for c in columns],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
