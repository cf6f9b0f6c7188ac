"""Statistics against brute force."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from rgft.bench.statistics import (
    area_under,
    cost_to_target,
    holm,
    interval,
    paired_p,
    performance_profile,
)


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_by_bonferroni(seed: int) -> None:
    rng = random.Random(seed)
    p = [rng.random() ** 3 for _ in range(rng.randint(1, 6))]
    subsets = [
        s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)
    ]
    closed = [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
        for i in range(len(p))
    ]
    assert holm(p) == pytest.approx(closed)


@pytest.mark.parametrize("seed", range(10))
def test_sign_flips_are_all_tried(seed: int) -> None:
    rng = random.Random(seed)
    groups = [[rng.gauss(0.5, 1) for _ in range(rng.randint(1, 4))] for _ in range(3)]
    weighted = [v / len(g) for g in groups for v in g]
    seen = abs(sum(weighted))
    flips = list(itertools.product((1, -1), repeat=len(weighted)))
    extreme = sum(
        abs(sum(s * v for s, v in zip(f, weighted, strict=True))) >= seen - 1e-9 for f in flips
    )
    assert paired_p(groups) == pytest.approx(extreme / len(flips))


def test_a_single_pair_shows_nothing() -> None:
    assert paired_p([[0.3]]) == 1.0 and paired_p([]) == 1.0


def test_interval_is_the_quantiles_of_all_resamples() -> None:
    groups = [[0.0, 1.0, 5.0], [2.0, 3.0, 4.0]]
    means = [
        [float(np.mean(drawn)) for drawn in itertools.product(values, repeat=3)]
        for values in groups
    ]
    every = [(a + b) / 2 for a, b in itertools.product(*means)]
    expected = np.quantile(every, [0.025, 0.975])
    assert interval(groups) == pytest.approx(tuple(expected), abs=0.15)
    assert all(math.isnan(end) for end in interval([[1.0]]))


@pytest.mark.parametrize("seed", range(10))
def test_profile_counts_tasks(seed: int) -> None:
    rng = random.Random(seed)
    costs = {
        f"task{t}": {f"arm{a}": rng.choice([1.0, 2.0, 3.0, 5.0, math.inf]) for a in range(4)}
        for t in range(6)
    }
    profile = performance_profile(costs)
    for arm, line in profile.items():
        for tau in (1.0, 1.4, 1.5, 2.0, 2.5, 5.0):
            solved = sum(
                math.isfinite(c[arm]) and c[arm] <= tau * min(c.values()) for c in costs.values()
            )
            told = max((rho for at, rho in line if at <= tau + 1e-9), default=0.0)
            assert told == pytest.approx(solved / len(costs))


def test_target_takes_measured_points_alone() -> None:
    assert cost_to_target([(1.0, 0.5), (3.0, 0.7), (2.0, 0.9)], 0.6) == 2.0
    assert cost_to_target([(1.0, 0.5)], 0.6) == math.inf


@pytest.mark.parametrize("seed", range(10))
def test_area_is_the_mean_over_budgets_drawn_at_random(seed: int) -> None:
    rng = random.Random(seed)
    curve = [(rng.uniform(0, 1.2), rng.random()) for _ in range(rng.randint(1, 5))]
    drawn = np.random.default_rng(seed).uniform(0, 1, 20_000)
    best = [max((q for c, q in curve if c <= budget), default=0.0) for budget in drawn]
    assert area_under(curve, 1.0) == pytest.approx(float(np.mean(best)), abs=0.02)


def test_p_of_many_pairs_agrees_with_student() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, 60)
    assert paired_p([values.tolist()]) == pytest.approx(
        stats.ttest_1samp(values, 0.0).pvalue, abs=0.02
    )
