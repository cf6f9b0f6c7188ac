"""A table of results: one form for the page, for Markdown and for the documentation."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rgft.bench.results import Result

IDLE = "idle"
CHANCE = "chance"
MARKS = {
    IDLE: "runs that ended before the method's first decision, so that it chose nothing.",
    CHANCE: (
        "seeds at most two standard errors (of the rows judged) above an answer that ignores its "
        "input."
    ),
}


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

    def section(self, mark: str) -> str:
        """The same under its title, with how to read it; `mark` is what makes a heading."""
        return f"{mark} {self.title}\n\n{self.caption}\n\n{self.markdown()}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def spread(result: Result, split: str | None = None) -> str:
    """Mean and deviation of the headline metric over seeds; x 100; and what is to be said of it."""
    scores = result.scores(split)
    text = spread_text([100 * score for score in scores.values()])
    counts = ((result.idle, len(result.runs), IDLE), (result.at_chance(split), len(scores), CHANCE))
    marks = [mark if count == of else f"{count} {mark}" for count, of, mark in counts if count]
    return f"{text} ({', '.join(marks)})" if marks else text


def explained(table: Table) -> Table:
    """The table, its caption with what the marks in its cells mean."""
    caption = table.caption
    for mark, text in MARKS.items():
        shown = re.compile(rf"\((?:\w+ ?\w*, )?(?:\d+ )?{mark}\b")
        if any(shown.search(cell) for row in table.rows for cell in row):
            caption += f" {mark}: {text}"
    return replace(table, caption=caption)


def spread_text(values: Sequence[float]) -> str:
    """Mean and, of several values, standard deviation; a dash where there are none.

    >>> spread_text([1.0, 3.0]), spread_text([1.0]), spread_text([])
    ('2.0 ± 1.4', '1.0', '-')
    """
    if not values:
        return "-"
    around = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{around}"


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
