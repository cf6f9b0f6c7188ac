"""The error map as a still picture."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from rgft.report import amounts
from rgft.report.grid import ErrorGrid
from rgft.report.heatmap import LABEL_CHARACTERS, MAX_COLUMNS
from rgft.report.run import Run

DPI = 150
WIDTH = 9.0  # inches
ROW, ROWS_HEIGHT = 0.24, (1.6, 8.0)  # inches; of one row, of all at least and at most
LABEL_HEIGHT = 0.15  # inches


def error_map_png(run: Run) -> bytes | None:
    """Draws the error map: components (embeddings at the bottom) x steps.

    Colour is E_k as a share of the step's total, on a square-root scale.

    Args:
        run: A loaded run.

    Returns:
        A PNG at 150 dpi, None if no error map was recorded.
    """
    if run.error_map is None:
        return None
    grid = run.error_map.thinned(MAX_COLUMNS)
    plot_height = min(ROWS_HEIGHT[1], max(ROWS_HEIGHT[0], ROW * len(grid.names)))
    figure = Figure(figsize=(WIDTH, plot_height + 1.1), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = _draw_cells(axes, grid)
    _draw_frozen(axes, grid)
    _label(axes, run, grid, plot_height)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=max(6, plot_height * 6))
    ticks = amounts.share_ticks(image.norm.vmax)
    bar.set_ticks(ticks, labels=[f"{100 * tick:g}%" for tick in ticks], minor=False)
    bar.minorticks_off()
    bar.set_label("share of total error\n(square-root scale)", fontsize=8)
    return _encoded(figure)


def _draw_cells(axes: Any, grid: ErrorGrid) -> Any:
    axes.set_facecolor("#e9ecef")
    top = float(np.nanmax(grid.share, initial=0)) or 1.0
    return axes.pcolormesh(
        _edges(grid.steps),
        np.arange(len(grid.names) + 1) - 0.5,
        np.ma.masked_invalid(grid.share),
        cmap="viridis",
        norm=PowerNorm(0.5, 0, top),
    )


def _edges(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Borders of the columns: halfway between steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _draw_frozen(axes: Any, grid: ErrorGrid) -> None:
    """A white line along every stretch of steps in which a component is frozen."""
    edges = _edges(grid.steps)
    changes = np.diff(grid.frozen.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(changes == 1)
    ends = np.nonzero(changes == -1)[1]
    lines = [
        [(edges[start], row), (edges[end], row)]
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]
    width = max(0.5, min(1.6, 40 / len(grid.names)))  # points
    axes.add_collection(LineCollection(lines, colors="white", linewidths=width, capstyle="butt"))


def _label(axes: Any, run: Run, grid: ErrorGrid, plot_height: float) -> None:
    every = int(np.ceil(LABEL_HEIGHT * len(grid.names) / plot_height))
    rows = range(0, len(grid.names), every)
    names = amounts.labels(grid.names, LABEL_CHARACTERS)
    # names are not formulas: a dollar sign in one stays a dollar sign
    axes.set_yticks(list(rows), [names[row] for row in rows], fontsize=7, parse_math=False)
    notes = ["white line: component frozen"] if grid.frozen.any() else []
    notes += ["grey: never scored so far"] if np.isnan(grid.share).any() else []
    note = f" ({'; '.join(notes)})" if notes else ""
    axes.set_xlabel(f"optimizer step{note}")
    title = f"Error map: {run.method} on {run.task} with {run.model}"
    axes.set_title(amounts.shortened(title, 75), fontsize=11, loc="left", parse_math=False)


def _encoded(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a name in a script that the font lacks shows boxes, which is no reason to warn
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
