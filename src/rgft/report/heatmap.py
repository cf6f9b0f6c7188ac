"""Components x steps as a Plotly heatmap that stays readable from 1 to 1,000 components."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from rgft.report import amounts
from rgft.report.grid import ErrorGrid, Floats

MAX_COLUMNS = 400
MAX_CELLS = 24_000  # of eleven matrices on a page: with plotly.js (4.8 MB) it stays under 7 MB
NOT_RECORDED = "#e9ecef"
PLOT_HEIGHT = (160, 1400)  # pixels; least and most
ROW_HEIGHT = 26
THINNEST_MARK = 1.5
LABEL_HEIGHT = 14
LABEL_CHARACTERS = 34


@dataclass(frozen=True, slots=True)
class View:
    """One way to colour the cells.

    Attributes:
        label: Name on its button.
        values: What is coloured; ``[K, T]``, NaN leaves the cell empty.
        colorscale: Name of a Plotly colour scale.
        limits: Values at both ends of the colour scale.
        ticks: Positions of labels along the colour bar; None for automatic ones.
        tick_texts: Labels at `ticks`.
        title: Title of the colour bar.
    """

    label: str
    values: Floats
    colorscale: str
    limits: tuple[float, float]
    title: str
    ticks: Sequence[float] | None = None
    tick_texts: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Overlay:
    """Marks on top of every view, and what the pointer shows.

    Attributes:
        mask: Marked cells; ``[K, T]``.
        name: What the mark means, for the legend.
        color: Colour of the mark.
        filling: Part of the row's height that the mark takes, in (0, 1].
        details: Values that `template` refers to as ``%{customdata[i]}``; ``[K, T, i]``.
        template: Plotly hover text below the component's name.
    """

    mask: npt.NDArray[np.bool_]
    name: str
    color: str
    filling: float
    details: Floats
    template: str


def columns_for(components: int) -> int:
    """How many steps to draw for that many components.

    Example:
        >>> columns_for(2), columns_for(300)
        (400, 80)
    """
    return max(2, min(MAX_COLUMNS, MAX_CELLS // components))


def heatmap(grid: ErrorGrid, views: Sequence[View], overlay: Overlay) -> go.Figure:
    """Draws `views` on top of each other, the first one visible, with a button for each.

    The overlay answers the pointer, on a second y axis with the same categories: so the first axis
    can shorten and thin out its labels, and the pointer still gets whole names.

    Args:
        grid: Names and steps, already thinned.
        views: Ways to colour the cells; at least one.
        overlay: Marks, and what the pointer shows.
    """
    names = [html.escape(name, quote=False) for name in grid.names]
    height = plot_height(len(names))
    row_height = height / len(names)
    figure = go.Figure()
    for index, view in enumerate(views):
        figure.add_trace(_cells(grid, names, view, visible=index == 0))
    mark = max(THINNEST_MARK, overlay.filling * row_height)
    figure.add_trace(_marks(grid, names, overlay, gap=max(0.0, row_height - mark)))
    if overlay.mask.any():
        figure.add_trace(_legend_entry(overlay))
    figure.update_layout(
        template="plotly_white",
        height=height + 130,
        margin={"l": 10, "r": 10, "t": 60, "b": 60},
        plot_bgcolor=NOT_RECORDED,
        xaxis={"title": "optimizer step", "showgrid": False, "zeroline": False},
        yaxis=_labelled_axis(names, row_height),
        yaxis2={**_category_axis(names), "overlaying": "y", "matches": "y", "visible": False},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )
    if len(views) > 1:
        figure.update_layout(updatemenus=[_buttons(views)])
    return figure


def plot_height(components: int) -> int:
    """Height of the plot area in pixels: grows with the rows up to a cap.

    Example:
        >>> plot_height(1), plot_height(10), plot_height(500)
        (160, 260, 1400)
    """
    least, most = PLOT_HEIGHT
    return max(least, min(most, ROW_HEIGHT * components))


def thinned_labels(count: int, row_height: float) -> range:
    """Rows that get a label where not all labels fit.

    Example:
        >>> list(thinned_labels(6, row_height=8.0))
        [0, 2, 4]
    """
    return range(0, count, max(1, int(np.ceil(LABEL_HEIGHT / row_height))))


def _category_axis(names: list[str]) -> dict[str, Any]:
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": names,
        "range": [-0.5, len(names) - 0.5],
        "showgrid": False,
    }


def _labelled_axis(names: list[str], row_height: float) -> dict[str, Any]:
    shown = [names[row] for row in thinned_labels(len(names), row_height)]
    labels = amounts.labels([html.unescape(name) for name in names], LABEL_CHARACTERS)
    texts = dict(zip(names, labels, strict=True))
    return {
        **_category_axis(names),
        "tickvals": shown,
        "ticktext": [html.escape(texts[name], quote=False) for name in shown],
        "tickfont": {"size": 11},
        "automargin": True,
    }


def _cells(grid: ErrorGrid, names: list[str], view: View, *, visible: bool) -> go.Heatmap:
    low, high = view.limits
    return go.Heatmap(
        x=grid.steps,
        y=names,
        z=view.values,
        zmin=low,
        zmax=high if high > low else low + 1,
        colorscale=view.colorscale,
        colorbar={
            "title": {"text": view.title, "side": "right"},
            "thickness": 14,
            "tickvals": view.ticks,
            "ticktext": view.tick_texts,
        },
        name=view.label,
        visible=visible,
        hoverinfo="skip",
    )


def _marks(grid: ErrorGrid, names: list[str], overlay: Overlay, *, gap: float) -> go.Heatmap:
    return go.Heatmap(
        x=grid.steps,
        y=names,
        yaxis="y2",
        z=np.where(overlay.mask, np.float32(1), np.float32(np.nan)),
        zmin=0,
        zmax=1,
        colorscale=[[0, overlay.color], [1, overlay.color]],
        showscale=False,
        ygap=gap,
        customdata=overlay.details,
        hovertemplate=f"<b>%{{y}}</b><br>step %{{x}}<br>{overlay.template}<extra></extra>",
        hoverongaps=True,
    )


def _legend_entry(overlay: Overlay) -> go.Scatter:
    """Plotly draws no legend for a heatmap: an empty line carries it."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "symbol": "square",
            "size": 12,
            "color": overlay.color,
            "line": {"width": 1, "color": "#495057"},
        },
        name=overlay.name,
        showlegend=True,
        hoverinfo="skip",
    )


def _buttons(views: Sequence[View]) -> dict[str, Any]:
    return {
        "type": "buttons",
        "direction": "right",
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 8},
        "buttons": [
            {
                "label": view.label,
                "method": "restyle",
                "args": [
                    {"visible": [other is view for other in views]},
                    list(range(len(views))),
                ],
            }
            for view in views
        ],
    }
