"""Differences paired by seed: an interval, a test, and its correction for several arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9_999
EXACT = 16  # pairs up to which every change of signs is tried


def interval(groups: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean over tasks of the mean over seeds.

    Seeds are drawn anew within each task (stratified). With three seeds such an interval is too
    narrow; it says nothing about other tasks. Efron and Tibshirani (1993), chapter 13.

    Args:
        groups: For each task, its values (differences between two arms, one a seed).
        level: Confidence.

    Returns:
        Both ends; NaN where a task has fewer than two values.

    Example:
        >>> interval([[1.0, 1.0], [3.0, 3.0]])
        (2.0, 2.0)
    """
    if not groups or any(len(values) < 2 for values in groups):
        return math.nan, math.nan
    arrays = [np.asarray(values, dtype=np.float64) for values in groups]
    found = stats.bootstrap(
        arrays,
        lambda *drawn, axis: np.mean([values.mean(axis=axis) for values in drawn], axis=0),
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_p(groups: Sequence[Sequence[float]]) -> float:
    """Two-sided p of the sign-flip (paired permutation) test on the mean over tasks.

    Under the hypothesis of no difference each difference is as likely with the other sign. Exact up
    to 16 pairs. The least that n pairs can show is 2 / 2^n: 0.25 for three seeds on one task.

    Example:
        >>> paired_p([[1.0, 2.0, 3.0]])
        0.25
    """
    weighted = [v / len(values) for values in groups for v in values]
    if len(weighted) < 2 or not any(weighted):
        return 1.0
    array = np.asarray(weighted)
    found = stats.permutation_test(
        (array, np.zeros_like(array)),
        lambda a, b, axis: np.sum(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**EXACT if len(array) <= EXACT else RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of several tests (Holm 1979): the chance of any false one is kept.

    $$ p'_{(i)} = max_{j <= i} min(1, (m - j + 1) p_{(j)}) $$

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
