"""The still pictures of README and docs, from records.

    python benchmarks/pictures.py

Writes docs/assets/quality_over_flops.png (the suite `headline`) and docs/assets/ablations.png (the
suites `levers` and `ablations`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rgft.bench.ablations import ablations
from rgft.bench.comparisons import differences
from rgft.bench.page import load
from rgft.bench.results import Result, results, shown
from rgft.bench.statistics import interval
from rgft.report.figures import KIND_COLORS

ROOT = Path(__file__).parent.parent
RECORDS, ASSETS = ROOT / "benchmarks" / "records", ROOT / "docs" / "assets"
DPI = 150
ROW = 0.22  # inches
CURVES = ("rgft", "full-tuned", "full")
BUDGETS = [0.1, 0.2, 0.3, 1.0]


def quality_over_flops(found: Sequence[Result]) -> Figure:
    """Headline metric over the share of full fine-tuning's FLOPs, a panel a task.

    The arms of CURVES are lines, with every seed as a dot; of the others there are crosses.
    """
    problems = list(dict.fromkeys(result.problem for result in found))
    figure = _figure(2.6 * len(problems), 2.9)
    for axes, problem in zip(figure.subplots(1, len(problems)), problems, strict=True):
        here = [result for result in found if result.problem == problem]
        for arm, color in zip(CURVES, KIND_COLORS, strict=False):
            points = sorted((r for r in here if r.arm == arm), key=lambda r: r.share)
            shares, means = [r.share for r in points], [100 * r.mean for r in points]
            axes.plot(shares, means, color=color, label=arm, linewidth=1.6, marker="o", ms=4)
            for r in points:
                scores = [100 * score for score in r.scores().values()]
                axes.plot([r.share] * len(scores), scores, ".", color=color, ms=3, alpha=0.5)
        rest = [r for r in here if r.arm not in CURVES]
        axes.plot(
            [r.share for r in rest], [100 * r.mean for r in rest], "x", color="#868e96", ms=4,
            label=f"the other {len({r.arm for r in rest})} arms",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(BUDGETS, [f"{budget:g}" for budget in BUDGETS])
        axes.minorticks_off()
        axes.set_title(shown(problem, found), fontsize=10)
        axes.tick_params(labelsize=8)
    figure.supxlabel("FLOPs, share of full fine-tuning", fontsize=9)
    figure.supylabel("headline metric x 100, test split", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def forest(found: Sequence[Result]) -> Figure:
    """What each change of one option gains over the arm that it changes, a panel a task.

    A dot is the mean over seeds, a bar its 95% bootstrap interval, small dots are the seeds.
    """
    problems = list(dict.fromkeys(result.problem for result in found))
    rows = {
        f"{one.option} {setting.label}": differences(found, setting.arm, one.base, one.budget)
        for one in ablations(found)
        for setting in one.settings
        if setting.arm != one.base
    }
    figure = _figure(9.0, ROW * len(rows) + 0.9)
    panels = figure.subplots(1, len(problems), sharex=True, sharey=True)
    for axes, problem in zip(panels, problems, strict=True):
        for y, groups in enumerate(rows.values()):
            if problem in groups:
                values = groups[problem]
                mean, (low, high) = statistics.fmean(values), interval([values])
                axes.plot(values, [y] * len(values), ".", color="#868e96", ms=3)
                axes.plot([low, high], [y, y], color=KIND_COLORS[0], linewidth=1.4)
                axes.plot([mean], [y], "o", color=KIND_COLORS[0], ms=4)
        axes.axvline(0, color="#adb5bd", linewidth=1)
        axes.set_title(shown(problem, found), fontsize=10)
        axes.set_xlabel("points on the test split", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#f1f3f5")
    panels[0].set_yticks(np.arange(len(rows)), list(rows), fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def main() -> None:
    drawn = {
        "quality_over_flops": quality_over_flops(results(load([RECORDS / "headline.jsonl"]))),
        "ablations": forest(results(load([RECORDS / "levers.jsonl", RECORDS / "ablations.jsonl"]))),
    }
    for name, figure in drawn.items():
        figure.savefig(ASSETS / f"{name}.png")


if __name__ == "__main__":
    main()
