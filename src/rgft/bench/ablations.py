"""Ablations: the arms that differ from another in one option, grouped by it."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go

from rgft.bench.comparisons import Comparison, compare, differences, levers
from rgft.bench.figures import error_bars
from rgft.bench.results import SPLITS, Problem, Result, judged_on, shown
from rgft.bench.statistics import interval
from rgft.bench.table import Table, budget_text, explained, interval_text, spread
from rgft.report.figures import KIND_COLORS

Place = tuple[str, str, float | str]  # an arm, its base, their budget


class Setting(NamedTuple):
    """An arm, and the value that it gives to the option; None for what the records do not say."""

    arm: str
    value: str | None
    more: str = ""  # what it changes besides

    @property
    def label(self) -> str:
        """How it is shown."""
        return (f"as in {self.arm}" if self.value is None else self.value) + self.more


@dataclass(frozen=True, slots=True)
class Ablation:
    """One option at several values.

    Attributes:
        option: Its name: of a setting of the guide, or an option of `rgft train`.
        base: The arm from which the others differ in it.
        budget: The budget of all.
        settings: The arms, that of the base among them, in order.
    """

    option: str
    base: str
    budget: float | str
    settings: tuple[Setting, ...]

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{self.option}, from {self.base} at budget {budget_text(self.budget)}"


def ablations(found: Sequence[Result]) -> list[Ablation]:
    """Every option that arms change in one that they extend, at every budget.

    An arm belongs to the option if that is all it changes; one that changes several settings of the
    guide belongs to the one named first.
    """
    told: dict[tuple[str, str, float | str], list[Setting]] = {}
    for result in found:
        run = next(iter(result.runs.values()))
        changed = _changed(run.get("changes") or {})
        if run.get("extends") and changed:
            option, *others = changed
            more = "".join(f", {name} {changed[name]}" for name in others)
            place = option, str(run["extends"]), result.budget
            told.setdefault(place, []).append(Setting(result.arm, str(changed[option]), more))
    shown = []
    for (option, base, budget), settings in told.items():
        ran = [r for r in found if (r.arm, r.budget) == (base, budget)]
        if ran:
            ordered = _in_order(_base(base, ran, option), settings)
            shown.append(Ablation(option, base, budget, ordered))
    return shown


def _changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(changes.get("settings") or {})
    options = {name: value for name, value in changes.items() if name != "settings"}
    if options:
        return options if len(options) == 1 and not settings else {}
    return settings


def _base(arm: str, ran: Sequence[Result], option: str) -> Setting:
    """The base with the value that its runs have, where they all have the same."""
    runs = [run for result in ran for run in result.runs.values()]
    values = [(run.get("config") or run).get(option, run.get(option)) for run in runs]
    plain = not any(value is None or isinstance(value, (dict, list)) for value in values)
    texts = set(map(str, values))
    return Setting(arm, texts.pop() if plain and len(texts) == 1 else None)


def _in_order(base: Setting, arms: Sequence[Setting]) -> tuple[Setting, ...]:
    """By value where all are numbers; else the base first."""
    every = [base, *dict.fromkeys(arms)]
    try:
        return tuple(sorted(every, key=lambda setting: float(setting.value or "")))
    except ValueError:
        return tuple(every)


def table(one: Ablation, found: Sequence[Result], compared: Mapping[Place, Comparison]) -> Table:
    """Quality at each value, and how far it is from the base's."""
    problems = list(dict.fromkeys(r.problem for r in found if r.arm in _arms(one)))
    rows = []
    for setting in one.settings:
        scores = _scores(found, problems, setting.arm, one.budget, (None,))
        change = compared.get((setting.arm, one.base, one.budget))
        rows.append([setting.label, setting.arm, *scores, *_difference(change)])
    header = [one.option, "arm", *(shown(p, found) for p in problems), "difference", "95% interval"]
    caption = (
        f"Headline metric x 100 ({judged_on(found)}), mean ± standard deviation over seeds, "
        f"and the mean difference from {one.base}, paired by task and seed."
    )
    return explained(Table(one.title, caption, header, rows))


def summary(found: Sequence[Result]) -> Table:
    """Every ablation in one table, on both splits."""
    compared = _compared(found)
    problems = list(dict.fromkeys(r.problem for r in found))
    rows: dict[Place, list[str]] = {}
    for one in ablations(found):
        budget = budget_text(one.budget)
        base = next(setting for setting in one.settings if setting.arm == one.base)
        own = _scores(found, problems, one.base, one.budget, SPLITS)
        rows.setdefault(
            (one.base, one.base, one.budget), [budget, "-", one.base, *own, *_difference(None), "-"]
        )
        for setting in one.settings:
            place = (setting.arm, one.base, one.budget)
            change = compared.get(place)
            if change is not None:
                before = "" if base.value in (None, setting.value) else f" {base.value}"
                scores = _scores(found, problems, setting.arm, one.budget, SPLITS)
                rows[place] = [
                    budget, f"{one.option}{before} → {setting.label}", setting.arm,
                    *scores, *_difference(change), str(change.pairs),
                ]  # fmt: skip
    names = [f"{shown(problem, found)}, {split}" for problem in problems for split in SPLITS]
    header = ["budget", "change", "arm", *names, "difference", "95% interval", "pairs"]
    caption = (
        "Headline metric x 100, mean ± standard deviation over seeds; mean difference from the "
        f"arm that is changed ({judged_on(found)}), of pairs of one task and seed, with a 95% "
        "bootstrap interval over seeds within tasks (too narrow with few of them)."
    )
    return explained(Table("Ablations", caption, header, list(rows.values())))


def with_tables(found: Sequence[Result]) -> list[tuple[Ablation, Table]]:
    """Every ablation and its table."""
    compared = _compared(found)
    return [(one, table(one, found, compared)) for one in ablations(found)]


def _arms(one: Ablation) -> set[str]:
    return {setting.arm for setting in one.settings}


def _compared(found: Sequence[Result]) -> dict[Place, Comparison]:
    return {(c.arm, c.base, c.budget): c for c in compare(found, levers(found))}


def _difference(change: Comparison | None) -> list[str]:
    if change is None:
        return ["-", "-"]
    return [f"{change.difference:+.1f}", interval_text(change.low, change.high)]


def _scores(
    found: Sequence[Result],
    problems: Sequence[Problem],
    arm: str,
    budget: float | str,
    splits: Sequence[str | None],
) -> list[str]:
    """On each problem and split (None: its own); a dash where the arm was not run."""
    at = {r.problem: r for r in found if (r.arm, r.budget) == (arm, budget)}
    return [spread(at[p], split) if p in at else "-" for p in problems for split in splits]


def figure(one: Ablation, found: Sequence[Result]) -> go.Figure:
    """The difference from the base at each value, a line a task, with its interval over seeds."""
    drawn = go.Figure()
    per_arm = {
        setting: differences(found, setting.arm, one.base, one.budget) for setting in one.settings
    }
    problems = list(dict.fromkeys(p for groups in per_arm.values() for p in groups))
    for number, problem in enumerate(problems):
        points = [(s.label, groups[problem]) for s, groups in per_arm.items() if problem in groups]
        means = [statistics.fmean(values) for _, values in points]
        ends = [interval([values]) for _, values in points]
        drawn.add_scatter(
            x=[html.escape(label) for label, _ in points],
            y=means,
            error_y=error_bars(means, ends),
            mode="lines+markers",
            name=html.escape(shown(problem, found)),
            line={"color": KIND_COLORS[number % len(KIND_COLORS)]},
        )
    drawn.add_hline(y=0, line={"width": 1, "color": "#adb5bd"})
    drawn.update_xaxes(title_text=html.escape(one.option), type="category")
    drawn.update_yaxes(title_text="points")
    return drawn.update_layout(template="plotly_white", height=300)
