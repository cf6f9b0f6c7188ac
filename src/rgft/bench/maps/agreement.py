"""How alike two maps are, and how much of that hangs on single components or on chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from rgft.bench.maps.run_maps import LEAST_COMPONENTS, Floats, Ints, aligned

RESAMPLES = 1_999
Measure = Callable[[Floats, Floats], Floats]


class Estimate(NamedTuple):
    """A mean, with a 95% interval; its ends are NaN where there is none."""

    value: float
    low: float
    high: float


def rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman's rho along the last axis; 0 where a side is constant.

    >>> float(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 9.0])).round(6))
    1.0
    """
    ranks = [stats.rankdata(side, axis=-1) for side in (x, y)]
    a, b = (side - side.mean(axis=-1, keepdims=True) for side in ranks)
    return cosine(a, b)


def cosine(x: Floats, y: Floats) -> Floats:
    """Cosine along the last axis; 0 where a side is 0."""
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    product = np.asarray((x * y).sum(axis=-1))
    told: Floats = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return told


def comparable(maps: Sequence[Mapping[str, float]]) -> bool:
    """Whether all of them have enough components in common."""
    return bool(aligned(maps).shape[1] >= LEAST_COMPONENTS)


def alike(x: Mapping[str, float], y: Mapping[str, float], measure: Measure) -> float:
    """One value for two maps; NaN if they have too few components in common."""
    if not comparable([x, y]):
        return math.nan
    return float(measure(*aligned([x, y])))


def over_pairs(maps: Sequence[Mapping[str, float]], measure: Measure) -> Estimate:
    """Mean over all pairs of maps, with a bootstrap interval over their components.

    Components are drawn anew, the same for every map: the interval says how much the mean hangs on
    single components. It says nothing about further seeds.
    """
    values = aligned(maps)
    pairs = list(itertools.combinations(range(len(values)), 2))

    def mean(drawn: Ints, axis: int) -> Floats:
        del axis  # the last
        told = [measure(values[i][drawn], values[j][drawn]) for i, j in pairs]
        average: Floats = np.mean(told, axis=0)
        return average

    components = np.arange(values.shape[1])
    found = stats.bootstrap(
        (components,),
        mean,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(mean(components, -1)), float(found.low), float(found.high))


class Grouping(NamedTuple):
    """Whether maps of the same group are more alike than maps of different ones.

    Attributes:
        within: Mean rank correlation of two maps of the same group.
        between: The same of two maps of different groups.
        p: Of the permutation test of no difference (one-sided), over assignments to groups.
    """

    within: float
    between: float
    p: float


def grouping(maps: Sequence[Mapping[str, float]], groups: Sequence[Hashable]) -> Grouping | None:
    """Compares pairs within groups with pairs across; None if there are none of either.

    Groups are assigned anew at random to the maps (Mantel 1967). The least p that can come out
    depends on how many assignments differ.
    """
    codes = np.unique([repr(group) for group in groups], return_inverse=True)[1]
    values = aligned(maps)
    alike = rank_correlation(values[:, None], values[None])
    upper = np.triu(np.ones_like(alike, dtype=bool), 1)

    def parts(labels: Ints) -> tuple[float, float]:
        same = labels[:, None] == labels[None]
        return float(alike[upper & same].mean()), float(alike[upper & ~same].mean())

    same = codes[:, None] == codes[None]
    if not (upper & same).any() or not (upper & ~same).any():
        return None
    p = stats.permutation_test(
        (codes,),
        lambda labels: np.subtract(*parts(labels)),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).pvalue
    return Grouping(*parts(codes), float(p))
