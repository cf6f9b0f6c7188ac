"""Beyond the headline: other domains, what is forgotten, and whether probabilities mean much."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rgft.bench.results import Result, judged_on, shown
from rgft.bench.table import Table, budget_order, budget_text, explained, spread, spread_text

OWN_DOMAIN = ("validation", "test")
CALIBRATION, PERPLEXITY = "calibration_error", "perplexity"


def other_domains(found: Sequence[Result]) -> Table:
    """The headline metric on test sets of domains that were not trained on, a column each."""
    names = dict.fromkeys(
        split
        for result in found
        for split in next(iter(result.runs.values()))["metrics"]
        if split not in OWN_DOMAIN and result.scores(split)
    )
    told = [r for r in _ordered(found) if any(r.scores(name) for name in names)]
    rows = [[*_named(r, found), spread(r), *(spread(r, name) for name in names)] for r in told]
    caption = "Headline metric x 100 on its own domain and on further test sets of a task."
    header = ["task", "budget", "arm", f"own domain ({judged_on(told)})", *names]
    return explained(Table("Other domains", caption, header, rows))


def forgetting(found: Sequence[Result]) -> Table:
    """What models could do before fine-tuning, and after."""
    rows = []
    for result in _ordered(found):
        measured = [run["forgetting"] for run in result.runs.values() if run.get("forgetting")]
        if not measured:
            continue
        finite = [one for one in measured if None not in (one["before"], one["after"])]
        of, metric = measured[0]["of"], measured[0]["metric"]
        scale = 1 if metric == "perplexity" else 100
        before, after = ([scale * one[when] for one in finite] for when in ("before", "after"))
        change = [now - then for then, now in zip(before, after, strict=True)]
        sign = "+" * (sum(change) > 0)
        values = [spread_text(before), spread_text(after), sign + spread_text(change)]
        lost = len(measured) - len(finite)
        rows.append(
            [*_named(result, found), f"{of}, {metric}", *values, str(len(finite)), str(lost)]
        )
    caption = (
        "What the pre-trained model can do untaught, before and after fine-tuning: Spearman's rho "
        "x 100 of people's ratings and the cosine of mean hidden states (stsb; more is better), or "
        "the perplexity of general text (wikitext; less is better)."
    )
    header = ["task", "budget", "arm", "of", "before", "after", "change", "seeds", "not finite"]
    return Table("Forgetting", caption, header, rows)


def calibration(found: Sequence[Result]) -> Table:
    """Expected calibration error of classifiers, where it was recorded; a column a task."""
    caption = (
        f"Expected calibration error x 100 on the {judged_on(found)}: how far confidence is from "
        "accuracy, over 15 bins of confidence; in brackets the loss there. Lower is better."
    )
    return _by_task("Calibration", caption, found, _calibrated)


def perplexity(found: Sequence[Result]) -> Table:
    """Perplexity of the texts to write, where it was recorded; a column a task."""
    caption = (
        f"Perplexity of the texts to write, on the {judged_on(found)}, of the arms at the rates of "
        "the leaderboard. Lower is better."
    )
    return _by_task("Perplexity", caption, found, lambda r: _recorded(r, PERPLEXITY))


def _by_task(
    title: str, caption: str, found: Sequence[Result], told: Callable[[Result], str | None]
) -> Table:
    """A row for each arm and budget, a column for each task of which there is something to tell."""
    cells = {(r.budget, r.arm, r.problem): told(r) for r in _ordered(found)}
    known = {place: text for place, text in cells.items() if text is not None}
    problems = [p for p in dict.fromkeys(r.problem for r in found) if any(p in at for at in known)]
    places = dict.fromkeys((budget, arm) for budget, arm, _ in known)
    rows = [
        [budget_text(budget), arm, *(known.get((budget, arm, p), "-") for p in problems)]
        for budget, arm in sorted(places, key=lambda place: budget_order(place[0]))
    ]
    return Table(title, caption, ["budget", "arm", *(shown(p, found) for p in problems)], rows)


def _calibrated(result: Result) -> str | None:
    """The calibration error of a result, and its loss; None where they were not recorded."""
    errors, losses = _recorded(result, CALIBRATION, 100), _values(result, "loss")
    return f"{errors} ({statistics.fmean(losses):.3f})" if errors and losses else None


def _recorded(result: Result, metric: str, scale: float = 1) -> str | None:
    """Mean and deviation of a metric over seeds; None where it was not recorded."""
    values = _values(result, metric)
    return spread_text([scale * value for value in values]) if values else None


def _values(result: Result, metric: str) -> list[float]:
    told = [run["metrics"].get(result.split, {}).get(metric) for run in result.runs.values()]
    return [value for value in told if value is not None]


def _ordered(found: Sequence[Result]) -> list[Result]:
    return sorted(found, key=lambda r: (r.problem, budget_order(r.budget)))


def _named(result: Result, found: Sequence[Result]) -> list[str]:
    return [shown(result.problem, found), budget_text(result.budget), result.arm]
