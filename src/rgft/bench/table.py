"""A table of results: one form for the page, for Markdown and for the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rgft.bench.results import Result


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, how to read it, and cells."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The cells as a Markdown table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def spread(result: Result, split: str) -> str:
    """Mean and, of several seeds, standard deviation; x 100."""
    scores = [100 * score for score in result.scores(split).values()]
    if not scores:
        return "-"
    around = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.1f}{around}"


def budget_order(budget: float | str) -> tuple[bool, float, str]:
    """For sorting: numbers first, then texts."""
    text = isinstance(budget, str)
    return text, 0.0 if isinstance(budget, str) else budget, str(budget)


def budget_text(budget: float | str) -> str:
    """As it is shown."""
    return budget if isinstance(budget, str) else f"{budget:g}"


def interval_text(low: float, high: float) -> str:
    """Both ends, signed; a dash where there are none."""
    return "-" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"
