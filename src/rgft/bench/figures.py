"""Figures of results; each a pure function of them, None where there is nothing to draw."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rgft.bench.comparisons import compare, levers
from rgft.bench.results import Result, clock, costs_to_target, shown
from rgft.bench.statistics import performance_profile
from rgft.report.figures import KIND_COLORS

DASHES = ("solid", "dash", "dot")
PER_ROW = 2
AXES = {
    "share": "FLOPs, share of full fine-tuning",
    "seconds": "seconds",
    "processor": "processor seconds",
}
MAPS_PER_ROW, MOST_MAPS = 4, 40


def quality_cost(found: Sequence[Result], cost: str) -> go.Figure | None:
    """Quality of every arm over what it costs ("share" of FLOPs or "seconds"), a panel a task.

    Seconds are the processor's where all results of the task have them.
    """
    problems = list(dict.fromkeys(result.problem for result in found))
    if not problems:
        return None
    arms = list(dict.fromkeys(result.arm for result in found))
    rows = -(-len(problems) // PER_ROW)
    titles = [html.escape(shown(problem, found)) for problem in problems]
    figure = make_subplots(rows, PER_ROW, subplot_titles=titles)
    for index, problem in enumerate(problems):
        row, column = divmod(index, PER_ROW)
        by = clock(r for r in found if r.problem == problem) if cost == "seconds" else cost
        for number, arm in enumerate(arms):
            points = [r for r in found if r.problem == problem and r.arm == arm]
            if points:
                first = not any(trace.legendgroup == arm for trace in figure.data)
                trace = _curve(points, by, number).update(showlegend=first)
                figure.add_trace(trace, row + 1, column + 1)
        name = AXES[by]
        figure.update_xaxes(title_text=name, type="log", row=row + 1, col=column + 1)
    return figure.update_layout(template="plotly_white", height=120 + 330 * rows)


def _curve(points: Sequence[Result], cost: str, number: int) -> go.Scatter:
    points = sorted(points, key=lambda r: float(getattr(r, cost)))
    scores = [[100 * s for s in r.scores().values()] for r in points]
    means = [sum(s) / len(s) for s in scores]
    arm = html.escape(points[0].arm)
    return go.Scatter(
        x=[getattr(r, cost) for r in points],
        y=means,
        error_y=error_bars(means, [(min(s), max(s)) for s in scores]),
        mode="lines+markers",
        name=arm,
        legendgroup=points[0].arm,
        line={
            "color": KIND_COLORS[number % len(KIND_COLORS)],
            "dash": DASHES[number // len(KIND_COLORS) % len(DASHES)],
        },
        customdata=[[str(r.budget), len(r.runs)] for r in points],
        hovertemplate=f"{arm}<br>budget %{{customdata[0]}}, %{{customdata[1]}} seeds"
        "<br>%{y:.1f} at %{x:.3~g}<extra></extra>",
    )


def profile(found: Sequence[Result]) -> go.Figure | None:
    """Performance profile of FLOPs to the target, over tasks."""
    steps = performance_profile(costs_to_target(found, "flops"))
    if not any(steps.values()):
        return None
    widest = max(tau for line in steps.values() for tau, _ in line) * 1.1
    figure = go.Figure()
    for number, (arm, line) in enumerate(steps.items()):
        if line:
            figure.add_scatter(
                x=[*(tau for tau, _ in line), widest],
                y=[*(rho for _, rho in line), line[-1][1]],
                name=html.escape(arm),
                line={"shape": "hv", "color": KIND_COLORS[number % len(KIND_COLORS)]},
            )
    figure.update_xaxes(title_text="FLOPs to target, relative to the cheapest arm", type="log")
    figure.update_yaxes(title_text="share of tasks", range=[0, 1.05])
    return figure.update_layout(template="plotly_white", height=420)


def waterfall(found: Sequence[Result]) -> go.Figure | None:
    """What each lever adds, in points: for every arm that extends another, by budget."""
    comparisons = compare(found, levers(found))
    if not comparisons:
        return None
    budgets = list(dict.fromkeys(c.budget for c in comparisons))
    figure = make_subplots(
        len(budgets), 1, subplot_titles=[f"budget {html.escape(str(b))}" for b in budgets]
    )
    for row, budget in enumerate(budgets, 1):
        here = [c for c in comparisons if c.budget == budget]
        # levers that start from different arms do not add up: each bar begins where its base ended
        heights: dict[str, float] = {}
        for c in here:
            heights[c.arm] = heights.get(c.base, 0.0) + c.difference
        figure.add_trace(
            go.Bar(
                x=[f"{html.escape(c.base)} → {html.escape(c.arm)}" for c in here],
                y=[c.difference for c in here],
                base=[heights[c.arm] - c.difference for c in here],
                error_y=error_bars([c.difference for c in here], [(c.low, c.high) for c in here]),
                text=[f"{c.difference:+.1f}" for c in here],
                marker={"color": ["#009e73" if c.difference >= 0 else "#d55e00" for c in here]},
                showlegend=False,
            ),
            row,
            1,
        )
    figure.update_yaxes(title_text="points")
    return figure.update_layout(template="plotly_white", height=120 + 260 * len(budgets))


def error_maps(found: Sequence[Result]) -> go.Figure | None:
    """A gallery of the error map over a run's course, as shares of its total."""
    shown_runs = []
    for result in found:
        for seed, run in sorted(result.runs.items())[:1]:
            if run.get("error_map"):
                title = f"{result.arm}, {shown(result.problem, found)}, {result.budget}"
                shown_runs.append((f"{title}, seed {seed}", run["error_map"]))
    shown_runs = shown_runs[:MOST_MAPS]
    if not shown_runs:
        return None
    rows = -(-len(shown_runs) // MAPS_PER_ROW)
    titles = [html.escape(title) for title, _ in shown_runs]
    figure = make_subplots(rows, MAPS_PER_ROW, subplot_titles=titles, horizontal_spacing=0.02)
    for index, (_, recorded) in enumerate(shown_runs):
        row, column = divmod(index, MAPS_PER_ROW)
        figure.add_trace(
            go.Heatmap(
                x=[f"{100 * at:.0f}%" for at in recorded["course"]],
                y=[html.escape(name) for name in recorded["components"]],
                z=list(zip(*map(_shares, recorded["error"]), strict=True)),
                colorscale="Viridis",
                zmin=0,
                showscale=False,
                hovertemplate="%{y}<br>after %{x}<br>%{z:.1%} of the error<extra></extra>",
            ),
            row + 1,
            column + 1,
        )
    figure.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False)
    figure.update_annotations(font={"size": 11})
    return figure.update_layout(template="plotly_white", height=60 + 160 * rows)


def error_bars(means: Sequence[float], ends: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Bars from the lower to the upper end around each mean; none where an end is NaN.

    >>> error_bars([1.0, 2.0], [(0.5, 3.0), (math.nan, math.nan)])["array"]
    [2.0, None]
    """
    return {
        "array": [_length(high - m) for m, (_, high) in zip(means, ends, strict=True)],
        "arrayminus": [_length(m - low) for m, (low, _) in zip(means, ends, strict=True)],
        "thickness": 1,
    }


def _length(value: float) -> float | None:
    return None if math.isnan(value) else max(0.0, value)


def _shares(errors: Sequence[float | None]) -> list[float | None]:
    total = sum(error or 0.0 for error in errors)
    return [None if error is None or not total else error / total for error in errors]
