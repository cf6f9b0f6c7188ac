"""The figures of a run, each a pure function of what it recorded; None where there is nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rgft.report import amounts
from rgft.report.grid import ErrorGrid, Floats
from rgft.report.heatmap import LABEL_CHARACTERS, Overlay, View, columns_for, heatmap
from rgft.report.run import Run

LOG_DECADES = 6
RANKED = 40
LOSS_POINTS = 2_000
LINE, FAINT, ACCENT = "#1f5a93", "#b6c9dd", "#b3541e"

# Okabe and Ito (2008), told apart with every common colour blindness
KIND_COLORS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#f0e442",
)  # fmt: skip


def error_map_figure(run: Run) -> go.Figure | None:
    """The error map over time: components (embeddings at the bottom) x steps.

    Three views: E_k as a share of the step's total (colours on a square-root scale, as a few
    components hold most of it), E_k itself, and E_k on a log scale over at most six decades.
    Frozen cells carry a white line.

    Args:
        run: A loaded run.

    Returns:
        The figure, None if no error map was recorded.
    """
    if run.error_map is None:
        return None
    grid = run.error_map.thinned(columns_for(len(run.error_map.names)))
    share = grid.share
    views = (
        _share_view(share),
        View("raw", grid.error, "Viridis", (0, _top(grid.error)), "error E"),
        _log_view(grid.error),
    )
    overlay = Overlay(
        mask=grid.frozen,
        name="frozen",
        color="#ffffff",
        filling=0.25,
        details=np.stack([grid.error, share, grid.lr_scale], axis=-1),
        template=(
            "error E %{customdata[0]:.4~g}<br>share of total %{customdata[1]:.2%}"
            "<br>lr_scale %{customdata[2]:.3~g}"
        ),
    )
    return heatmap(grid, views, overlay)


def lr_scale_figure(run: Run) -> go.Figure | None:
    """Multipliers on the scheduled learning rate: components x steps, frozen cells grey.

    Colours are symmetric in log2 around 1: twice the rate is as far from neutral as half of it.

    Args:
        run: A loaded run.

    Returns:
        The figure, None if no error map was recorded.
    """
    if run.error_map is None:
        return None
    grid = run.error_map.thinned(columns_for(len(run.error_map.names)))
    doublings = _log(grid.lr_scale, np.log2)
    reach = int(min(6, max(1, np.ceil(np.abs(doublings[np.isfinite(doublings)]).max(initial=0)))))
    ticks = list(range(-reach, reach + 1))
    view = View(
        "lr_scale", doublings, "PuOr_r", (-reach, reach), "lr_scale", ticks,
        [f"{2**tick}x" if tick >= 0 else f"1/{2**-tick}x" for tick in ticks],
    )  # fmt: skip
    overlay = Overlay(
        mask=grid.frozen,
        name="frozen",
        color="#868e96",
        filling=1.0,
        details=np.stack([grid.lr_scale, grid.error], axis=-1),
        template="lr_scale %{customdata[0]:.3~g}<br>error E %{customdata[1]:.4~g}",
    )
    return heatmap(grid, (view,), overlay)


def quality_figure(run: Run) -> go.Figure | None:
    """Validation quality over steps and over FLOPs, and the training loss.

    Args:
        run: A loaded run.

    Returns:
        One panel for each of the three that was recorded, None if none was.
    """
    metric = html.escape(run.metric, quote=False)
    panels: list[tuple[str, str, list[go.Scatter]]] = []
    if run.history:
        size, prefix = amounts.si_unit(max(point.flops for point in run.history))
        steps = [float(point.step) for point in run.history]
        spent = [point.flops / size for point in run.history]
        panels = [
            (f"validation {metric} over steps", "optimizer step", [_quality_line(run, steps)]),
            (f"validation {metric} over FLOPs", f"{prefix}FLOP", [_quality_line(run, spent)]),
        ]
    if run.train_loss:
        panels.append(("loss", "optimizer step", _loss_lines(run)))
    if not panels:
        return None
    figure = make_subplots(cols=len(panels), subplot_titles=[title for title, _, _ in panels])
    for column, (_, axis, lines) in enumerate(panels, start=1):
        figure.add_traces(lines, rows=1, cols=column)
        figure.update_xaxes(title_text=axis, col=column)
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 10, "r": 10, "t": 60, "b": 10},
        legend={
            "x": 1,
            "xanchor": "right",
            "y": 0.97,
            "yanchor": "top",
            "bgcolor": "rgba(255,255,255,0.7)",
        },
        hovermode="closest",
    )
    figure.update_yaxes(automargin=True)
    return figure


def ranking_figure(run: Run) -> go.Figure | None:
    """The last error map as a ranking: the components with the largest share of the total.

    Args:
        run: A loaded run.

    Returns:
        Bars coloured by kind, hatched where frozen, at most 40; None if no error was recorded.
    """
    if run.error_map is None:
        return None
    grid, share = run.error_map, run.error_map.share[:, -1]
    ranked = ranking(share)[:RANKED]
    if not len(ranked):
        return None
    names = [html.escape(grid.names[row], quote=False) for row in ranked]
    figure = go.Figure([
        _bars(run, grid, share, [row for row in ranked if grid.kinds[row] == kind], color)
        for kind, color in _kind_colors(grid, ranked).items()
    ])  # fmt: skip
    figure.update_layout(
        template="plotly_white",
        height=max(180, 110 + 22 * len(ranked)),
        margin={"l": 10, "r": 10, "t": 40, "b": 50},
        xaxis={"title": "share of total error at the last recorded step", "tickformat": ".2~%"},
        yaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": names[::-1],
            "tickvals": names,
            "ticktext": [
                html.escape(label, quote=False)
                for label in amounts.labels([grid.names[row] for row in ranked], LABEL_CHARACTERS)
            ],
            "automargin": True,
        },
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        bargap=0.25,
        showlegend=True,
    )
    return figure


def ranking(share: Floats) -> npt.NDArray[np.int64]:
    """Rows by falling share; rows without one are left out.

    Example:
        >>> ranking(np.array([0.1, np.nan, 0.9], dtype=np.float32)).tolist()
        [2, 0]
    """
    order = np.argsort(-share, kind="stable")
    return order[np.isfinite(share[order])].astype(np.int64)


def _top(values: Floats) -> float:
    return float(np.max(values, where=np.isfinite(values), initial=0))


def _log(values: Floats, log: np.ufunc) -> Floats:
    """The logarithm, NaN where there is none."""
    out = np.full_like(values, np.nan)
    log(values, out=out, where=values > 0)
    return out


def _share_view(share: Floats) -> View:
    top = _top(share)
    ticks = amounts.share_ticks(top)
    return View(
        "share of step total", np.sqrt(share), "Viridis", (0, math.sqrt(top)),
        "share of total error<br>(square-root scale)",
        [math.sqrt(tick) for tick in ticks], [f"{100 * tick:g}%" for tick in ticks],
    )  # fmt: skip


def _log_view(error: Floats) -> View:
    decades = _log(error, np.log10)
    finite = decades[np.isfinite(decades)]
    high = math.ceil(finite.max(initial=-np.inf)) if finite.size else 0
    low = max(math.floor(finite.min()) if finite.size else -1, high - LOG_DECADES)
    ticks = range(low, high + 1)
    return View(
        "log scale", decades, "Viridis", (low, high), "error E (log scale)",
        [float(tick) for tick in ticks], [f"{10.0**tick:g}" for tick in ticks],
    )  # fmt: skip


def _quality_line(run: Run, x: Sequence[float]) -> go.Scatter:
    values = [point.metrics.get(run.metric, math.nan) for point in run.history]
    details = [
        [point.step, amounts.flops(point.flops), amounts.duration(point.seconds)]
        for point in run.history
    ]
    return go.Scatter(
        x=x,
        y=values,
        customdata=details,
        mode="lines+markers",
        line={"color": LINE},
        showlegend=False,
        hovertemplate=(
            f"{html.escape(run.metric, quote=False)} %{{y:.4~g}}<br>step %{{customdata[0]}}"
            "<br>%{customdata[1]} spent<br>after %{customdata[2]}<extra></extra>"
        ),
    )


def _loss_lines(run: Run) -> list[go.Scatter]:
    """The logged losses, their running mean, and the validation loss where there is one."""
    every = math.ceil(len(run.train_loss) / LOSS_POINTS)
    points = run.train_loss[::every]
    steps, losses = [point.step for point in points], [point.loss for point in points]
    lines = [_line(steps, losses, "training", LINE)]
    if len(losses) >= 50:
        lines = [
            go.Scatter(x=steps, y=losses, mode="lines", line={"color": FAINT, "width": 1},
                       showlegend=False, hoverinfo="skip"),
            _line(steps, _running_mean(losses, len(losses) // 20), "training (running mean)", LINE),
        ]  # fmt: skip
    validation = [point.metrics.get("loss", math.nan) for point in run.history]
    if any(math.isfinite(value) for value in validation):
        dashed = _line([point.step for point in run.history], validation, "validation", ACCENT)
        lines.append(dashed.update(mode="lines+markers", line_dash="dot"))
    return lines


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the beginning; skips NaN."""
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    ones = np.ones(window)
    total = np.convolve(np.where(known, array, 0), ones)[: len(array)]
    number = np.convolve(known, ones)[: len(array)]
    mean = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    return [float(value) for value in mean]


def _line(x: Sequence[int], y: Sequence[float], name: str, color: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=name,
        line={"color": color},
        hovertemplate="step %{x}<br>loss %{y:.4~g}",
    )


def _kind_colors(grid: ErrorGrid, rows: npt.NDArray[np.int64]) -> dict[str, str]:
    kinds = dict.fromkeys(grid.kinds)  # forward order, so that two runs of a model agree
    colors = {kind: KIND_COLORS[index % len(KIND_COLORS)] for index, kind in enumerate(kinds)}
    shown = {grid.kinds[row] for row in rows}
    return {kind: color for kind, color in colors.items() if kind in shown}


def _bars(run: Run, grid: ErrorGrid, share: Floats, rows: list[int], color: str) -> go.Bar:
    sizes = {component.name: component.numel for component in run.components}
    frozen = grid.frozen[:, -1]
    details = [
        [
            float(grid.error[row, -1]),
            "frozen" if frozen[row] else f"lr_scale {grid.lr_scale[row, -1]:.3g}",
            amounts.count(sizes.get(grid.names[row], math.nan)),
        ]
        for row in rows
    ]
    return go.Bar(
        orientation="h",
        x=[float(share[row]) for row in rows],
        y=[html.escape(grid.names[row], quote=False) for row in rows],
        name=html.escape(grid.kinds[rows[0]].replace("_", " "), quote=False),
        marker={"color": color, "pattern": {"shape": ["/" if frozen[row] else "" for row in rows]}},
        customdata=details,
        hovertemplate=(
            "<b>%{y}</b><br>share of total %{x:.2%}<br>error E %{customdata[0]:.4~g}"
            "<br>%{customdata[1]}<br>%{customdata[2]} parameters<extra></extra>"
        ),
    )
