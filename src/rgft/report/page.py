"""One HTML page about one run; it opens offline and fetches nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rgft.report import amounts
from rgft.report.figures import (
    RANKED,
    error_map_figure,
    lr_scale_figure,
    quality_figure,
    ranking_figure,
)
from rgft.report.run import Run

IN_DOMAIN = ("train", "validation", "test")
NO_ERROR_MAP = "No error map was recorded."
IDLE = "the run ended before the method's first decision: it was plain fine-tuning"


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number at the top of the page, what it is, and what to compare it with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with its heading and how to read it, or why it is absent.

    Attributes:
        name: Identifier in the page.
        title: Heading.
        figure: The figure as JSON that is safe inside a script element; None if there is none.
        caption: A sentence or two on how to read it.
        absent: What to say where there is no figure.
    """

    name: str
    title: str
    figure: Markup | None
    caption: str
    absent: str


@dataclass(frozen=True, slots=True)
class Table:
    """Names and values under a heading."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class MetricsTable:
    """Final metrics: a row for each split, a column for each metric."""

    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def render_page(run: Run) -> str:
    """The page as HTML; all text of the run is escaped.

    Args:
        run: A loaded run.

    Returns:
        A whole document with style, data and plotly.js inside.
    """
    shown = panels(run)
    return template("page.html.jinja").render(
        run=run,
        title=f"{run.method} on {run.task} with {run.model}",
        subtitle=_subtitle(run),
        key_figures=key_figures(run),
        panels=shown,
        metrics=metrics_table(run),
        tables=tables(run),
        plotly_js=Markup(get_plotlyjs()) if any(one.figure for one in shown) else None,
    )


def template(name: str) -> Template:
    """A page's template; everything that is put into it is escaped."""
    loader = PackageLoader("rgft", "report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(name)


def key_figures(run: Run) -> list[KeyFigure]:
    """The row of numbers at the top: quality, then what it cost."""
    train, overhead = run.seconds["train"], run.seconds["overhead"]
    total, updated = run.parameters["total"], run.updated_per_step["mean"]
    return [
        KeyFigure(
            f"validation {run.metric}",
            amounts.metric(run.headline("validation")),
            _last_evaluation(run) if run.headline("validation") is None else "",
        ),
        KeyFigure(f"test {run.metric}", amounts.metric(run.headline("test"))),
        KeyFigure(
            "compute spent",
            amounts.share(run.flops["share"]),
            f"of full fine-tuning's {amounts.flops(run.flops['full'])}",
        ),
        KeyFigure(
            "updated per step",
            amounts.share(_ratio(updated, total)),
            f"of {amounts.count(total)} parameters, mean",
        ),
        KeyFigure("training time", amounts.duration(train)),
        KeyFigure(
            "overhead",
            amounts.duration(overhead),
            f"of the method: {amounts.share(_ratio(overhead, train))} of training time",
        ),
        KeyFigure("peak memory", amounts.memory(run.peak_memory_bytes)),
    ]


def panels(run: Run) -> list[Panel]:
    """The figures in reading order, each with its sentence."""
    return [
        panel(error_map_figure(run), "error-map", "Error map", _error_map_caption(run),
               NO_ERROR_MAP),
        panel(lr_scale_figure(run), "lr-scale", "Learning-rate multipliers",
               "How much faster (orange, above 1x) or slower (purple, below 1x) than the schedule "
               "each component learned; white is the plain scheduled rate, grey is frozen.",
               NO_ERROR_MAP),
        panel(quality_figure(run), "quality", "Quality and loss", _quality_caption(run),
               "Neither evaluations nor training losses were recorded."),
        panel(ranking_figure(run), "ranking", "Where the error is at the end",
               _ranking_caption(run), NO_ERROR_MAP),
    ]  # fmt: skip


def metrics_table(run: Run) -> MetricsTable:
    """Final metrics, the headline metric first, out-of-domain splits last."""
    found = dict.fromkeys(name for values in run.metrics.values() for name in values)
    names = sorted(found, key=lambda name: name != run.metric)
    splits = sorted(run.metrics, key=_split_order)
    return MetricsTable(
        names=names,
        rows=[
            (
                split if split in IN_DOMAIN else f"{split} (out of domain)",
                [amounts.metric(run.metrics[split].get(name)) for name in names],
            )
            for split in splits
        ],
    )


def tables(run: Run) -> list[Table]:
    """Settings, versions and hardware."""
    return [
        Table("Settings", _rows({
            "method": run.method, "task": run.task, "model": run.model, "seed": run.seed,
            "learning rate": run.lr, "epochs": run.epochs, "batch size": run.batch_size,
            **({} if run.budget is None else {"budget": run.budget}),
            **({} if run.start is None else {"start": run.start}),
            **({} if run.stages is None else {"stages": run.stages}),
            **({} if run.forgetting is None else {"forgetting": run.forgetting}),
            **({"idle": IDLE} if run.idle else {}),
            "granularity": run.granularity, "components": len(run.components),
            "trainable parameters": amounts.count(run.parameters["trainable"]),
            "compute spent": amounts.flops(run.flops["spent"]),
            "evaluation time": amounts.duration(run.seconds["evaluate"]),
        })),
        Table("Method's configuration", _rows(run.config)),
        Table("Versions", _rows(run.versions)),
        Table("Hardware", _rows(run.hardware)),
    ]  # fmt: skip


def panel(figure: go.Figure | None, name: str, title: str, caption: str, absent: str) -> Panel:
    """A figure's panel, ready for a template."""
    data = None if figure is None else script_safe(figure.to_json())
    return Panel(name, title, data, caption, absent)


def script_safe(data: str) -> Markup:
    """JSON that cannot end the script element around it: these occur only inside its strings."""
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return Markup(data)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _last_evaluation(run: Run) -> str:
    if not run.history:
        return ""
    last = run.history[-1]
    return f"last: {amounts.metric(last.metrics.get(run.metric))} at step {last.step}"


def _subtitle(run: Run) -> str:
    parts = [f"started {run.started.replace('T', ' ')[:19]}", f"seed {run.seed}"]
    if run.granularity:
        parts.append(f"{len(run.components)} components ({run.granularity})")
    return " · ".join(parts)


def _error_map_caption(run: Run) -> str:
    if run.error_map is None:
        return ""
    return (
        "A row is a component, embeddings at the bottom and the task head on top; a column is a "
        "step. Bright cells contribute most of the error at that step. White lines mark frozen "
        "components; light grey cells were never scored so far. The raw view compares steps, the "
        "log scale shows small errors beside large ones."
    )


def _quality_caption(run: Run) -> str:
    parts = []
    if run.history:
        parts = [
            f"Quality (validation {run.metric}) against the steps taken, then the same points "
            "against the compute that they had cost: where the curve is flat, compute buys little."
        ]
    if run.train_loss:
        parts.append(
            "The loss falls while the model learns; a validation loss that turns up again "
            "beside a falling training loss is overfitting."
        )
    return " ".join(parts)


def _ranking_caption(run: Run) -> str:
    if run.error_map is None:
        return ""
    count = len(run.error_map.names)
    which = f"The {RANKED} largest of {count} components" if count > RANKED else "All components"
    return (
        f"{which}, by their share of the total error at the last recorded step; colour is the "
        "kind, hatching marks components that are frozen there."
    )


def _split_order(split: str) -> tuple[int, str]:
    return (IN_DOMAIN.index(split), "") if split in IN_DOMAIN else (len(IN_DOMAIN), split)


def _rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(name, _shown(value)) for name, value in values.items()]


def _shown(value: object) -> str:
    if value is None or value != value:  # noqa: PLR0124 - NaN alone differs from itself
        return amounts.MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
