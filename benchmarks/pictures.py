"""The still pictures of README and docs, from records.

    python benchmarks/pictures.py

Writes docs/assets/quality_over_flops.png (the suite `headline`) and docs/assets/ablations.png (the
suites `levers` and `ablations`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rgft.bench.ablations import ablations
from rgft.bench.comparisons import differences
from rgft.bench.page import load
from rgft.bench.results import Result, judged_on, results, shown

ROOT = Path(__file__).parent.parent
RECORDS, ASSETS = ROOT / "benchmarks" / "records", ROOT / "docs" / "assets"
DPI = 150
ROW = 0.22  # inches
RECORDS_OF = "Records"  # a picture's own word for the digest of what it shows
LINES = {"rgft": "#0072b2", "full-tuned": "#e69f00", "full-tuned-16": "#cc79a7", "full": "#009e73"}


def quality_over_flops(found: Sequence[Result]) -> Figure:
    """Headline metric over the share of full fine-tuning's FLOPs, a panel a task.

    The arms of `LINES` are lines, with every seed as a dot; of the others there are crosses.
    """
    problems = list(dict.fromkeys(result.problem for result in found))
    budgets = sorted({float(result.budget) for result in found})
    figure = _figure(2.6 * len(problems), 2.9)
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        here = [result for result in found if result.problem == problem]
        for arm, color in LINES.items():
            points = sorted((r for r in here if r.arm == arm), key=lambda r: r.share)
            shares, means = [r.share for r in points], [100 * r.mean for r in points]
            axes.plot(shares, means, color=color, label=arm, linewidth=1.6, marker="o", ms=4)
            for r in points:
                scores = [100 * score for score in r.scores().values()]
                axes.plot([r.share] * len(scores), scores, ".", color=color, ms=3, alpha=0.5)
        rest = [r for r in here if r.arm not in LINES]
        axes.plot(
            [r.share for r in rest], [100 * r.mean for r in rest], "x", color="#868e96", ms=4,
            label="other arms",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.minorticks_off()
        axes.set_title(shown(problem, found), fontsize=10)
        axes.tick_params(labelsize=8)
    figure.supxlabel("FLOPs, share of full fine-tuning", fontsize=9)
    figure.supylabel(f"headline metric x 100, {judged_on(found)}", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def forest(found: Sequence[Result]) -> Figure:
    """What each change of one option gains over the arm that it changes, a panel a task.

    A dot is the mean over seeds, small dots are the seeds, a bar goes from the worst to the best.
    """
    problems = list(dict.fromkeys(result.problem for result in found))
    rows = {
        (setting.arm, one.base, one.budget): differences(found, setting.arm, one.base, one.budget)
        for one in ablations(found)
        for setting in one.settings
        if setting.arm != one.base
    }
    figure = _figure(9.0, ROW * len(rows) + 0.9)
    panels = figure.subplots(1, len(problems), sharex=True, sharey=True, squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        for y, groups in enumerate(rows.values()):
            if problem in groups:
                values = groups[problem]
                axes.plot([min(values), max(values)], [y, y], color=LINES["rgft"], linewidth=1.4)
                axes.plot(values, [y] * len(values), ".", color="#868e96", ms=3)
                axes.plot([statistics.fmean(values)], [y], "o", color=LINES["rgft"], ms=4)
        axes.axvline(0, color="#adb5bd", linewidth=1)
        axes.set_title(shown(problem, found), fontsize=10)
        axes.set_xlabel(f"points, {judged_on(found)}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#f1f3f5")
    names = [arm for arm, _, _ in rows]
    panels[0].set_yticks(np.arange(len(rows)), names, fontsize=8, parse_math=False)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def digest(names: Sequence[str]) -> str:
    """Of files of records."""
    return sha256(b"".join((RECORDS / name).read_bytes() for name in names)).hexdigest()


def main() -> None:
    for name, (draw, files) in PICTURES.items():
        figure = draw(results(load([RECORDS / file for file in files])))
        figure.savefig(ASSETS / name, metadata={RECORDS_OF: digest(files)})


PICTURES = {
    "quality_over_flops.png": (quality_over_flops, ["headline.jsonl"]),
    "ablations.png": (forest, ["levers.jsonl", "ablations.jsonl"]),
}

if __name__ == "__main__":
    main()
