"""Which learning rate an arm gets: the best on validation, over the seeds that all rates ran at.

Where texts are written, that is the rate of least loss: writing is slow, so that few texts are
judged, and a score of few texts has chosen rates whose models have a far worse perplexity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rgft.text_metrics import JUDGES


def chosen_rate(records: Iterable[Mapping[str, Any]]) -> float | Literal["none"] | None:
    """The rate that is best on validation in the mean, of equals the lowest.

    Only finished records count, and only seeds at which every rate that finished anywhere did;
    where there is no such seed, all.

    Args:
        records: Of one arm on one task with one model and budget.

    Returns:
        The rate, None for the method's own; "none" if nothing has finished.

    Example:
        >>> def run(rate, seed, score):
        ...     metrics = {"validation": {"accuracy": score}}
        ...     return {"rate": rate, "seed": seed, "metric": "accuracy", "metrics": metrics}
        >>> chosen_rate([run(1e-4, 0, 0.8), run(2e-4, 0, 0.9), run(2e-4, 1, 0.1)])
        0.0002
    """
    scores: dict[float | None, dict[int, float]] = {}
    for record in records:
        if record.get("status", "finished") == "finished":
            scores.setdefault(record["rate"], {})[record["seed"]] = _score(record)
    if not scores:
        return "none"
    shared = set.intersection(*(set(by_seed) for by_seed in scores.values()))

    def place(rate: float | None) -> tuple[float, float]:
        by_seed = scores[rate]
        return statistics.fmean(by_seed[seed] for seed in (shared or by_seed)), -(rate or 0.0)

    return max(scores, key=place)


def _score(record: Mapping[str, Any]) -> float:
    """What a run is chosen by; more is better."""
    writes = record["metric"] in JUDGES
    value = record["metrics"]["validation"]["loss" if writes else record["metric"]]
    if value is None:
        return -math.inf
    return -float(value) if writes else float(value)
