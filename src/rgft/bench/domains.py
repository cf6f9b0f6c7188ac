"""Beyond the headline: other domains, what is forgotten, and whether probabilities mean much."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rgft.bench.results import Result, judged_on, shown
from rgft.bench.table import Table, budget_order, budget_text, spread, spread_text

OWN_DOMAIN = ("validation", "test")
CALIBRATION = "calibration_error"


def other_domains(found: Sequence[Result]) -> Table:
    """The headline metric on test sets of domains that were not trained on."""
    rows = []
    for result in _ordered(found):
        splits = next(iter(result.runs.values()))["metrics"]
        rows += [
            [*_named(result, found), split, spread(result, split), spread(result)]
            for split in splits
            if split not in OWN_DOMAIN and result.scores(split)
        ]
    caption = "Headline metric x 100 on further test sets of a task, beside that of its own domain."
    header = ["task", "budget", "arm", "test set", "there", f"own domain ({judged_on(found)})"]
    return Table("Other domains", caption, header, rows)


def forgetting(found: Sequence[Result]) -> Table:
    """What models could do before fine-tuning, and after."""
    rows = []
    for result in _ordered(found):
        told = [run["forgetting"] for run in result.runs.values() if run.get("forgetting")]
        told = [one for one in told if None not in (one["before"], one["after"])]
        if not told:
            continue
        of, metric = told[0]["of"], told[0]["metric"]
        scale = 1 if metric == "perplexity" else 100
        before, after = ([scale * one[when] for one in told] for when in ("before", "after"))
        change = [now - then for then, now in zip(before, after, strict=True)]
        sign = "+" * (statistics.fmean(change) > 0)
        shown_values = [spread_text(before), spread_text(after), sign + spread_text(change)]
        rows.append([*_named(result, found), f"{of}, {metric}", *shown_values])
    caption = (
        "What the pre-trained model can do untaught, before and after fine-tuning: Spearman's rho "
        "x 100 of people's ratings and the cosine of mean hidden states (stsb; more is better), or "
        "the perplexity of general text (wikitext; less is better)."
    )
    header = ["task", "budget", "arm", "of", "before", "after", "change"]
    return Table("Forgetting", caption, header, rows)


def calibration(found: Sequence[Result]) -> Table:
    """Expected calibration error of classifiers, where it was recorded."""
    rows = []
    for result in _ordered(found):
        told = [run["metrics"].get(result.split, {}) for run in result.runs.values()]
        errors = [100 * m[CALIBRATION] for m in told if m.get(CALIBRATION) is not None]
        losses = [m["loss"] for m in told if m.get("loss") is not None]
        if errors and losses:
            loss = f"{statistics.fmean(losses):.3f}"
            rows.append([*_named(result, found), spread_text(errors), loss])
    caption = (
        f"Expected calibration error x 100 on the {judged_on(found)}: how far confidence is from "
        "accuracy, over 15 bins of confidence; and the loss there. Lower is better."
    )
    header = ["task", "budget", "arm", "calibration error", "loss"]
    return Table("Calibration", caption, header, rows)


def _ordered(found: Sequence[Result]) -> list[Result]:
    return sorted(found, key=lambda r: (r.problem, budget_order(r.budget)))


def _named(result: Result, found: Sequence[Result]) -> list[str]:
    return [shown(result.problem, found), budget_text(result.budget), result.arm]
