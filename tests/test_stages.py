"""When a run that finds its own budget goes on, and which of its stages is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from rgft.stages import STAGES, STANDARD_ERRORS, Yardstick, best_stage, worth_going_on

ACCURACY = Yardstick("accuracy", rows=900, chance=0.5)
MATTHEWS = Yardstick("matthews_correlation", rows=1000, chance=0.0)
LOSS = Yardstick("loss", lower_is_better=True)


def test_stages_double_what_is_spent() -> None:
    assert [b / a for a, b in pairwise(STAGES[:-1])] == [2.0] * 3
    assert STAGES[-1] == 1


@pytest.mark.parametrize(
    ("yardstick", "values", "goes_on"),
    [
        (ACCURACY, [0.9], True),
        (ACCURACY, [0.9, 0.92], True),  # a standard error is 0.01
        (ACCURACY, [0.9, 0.909], False),
        (ACCURACY, [0.9, 0.85], False),
        (ACCURACY, [0.8, 0.9, 0.905], False),
        (ACCURACY, [1.0], False),  # nothing is left to gain
        (ACCURACY, [0.52, 0.51, 0.53, 0.5], True),  # at chance: 0.5 +- 2 * 0.0167
        (ACCURACY, [0.52, 0.51, 0.53, 0.7], True),
        (ACCURACY, [0.52, 0.51, 0.7, 0.7], False),
        (MATTHEWS, [0.0, 0.0, 0.0], True),
        (MATTHEWS, [0.0, 0.0, 0.2], True),
        (MATTHEWS, [0.0, 0.3, 0.32], False),
        (MATTHEWS, [0.0, 0.3, -0.1], False),
        (LOSS, [0.7], True),
        (LOSS, [0.7, 0.7], True),  # chance is not known: two in a row
        (LOSS, [0.7, 0.7, 0.694], False),
        (LOSS, [0.7, 0.7, 0.6], True),
        (LOSS, [0.7, 0.6, 0.6], True),
        (LOSS, [0.7, 0.6, 0.65, 0.595], False),
        (LOSS, [math.nan, 0.7, 0.7], True),
        (LOSS, [0.7, math.nan, math.inf], False),
    ],
)
def test_when_a_run_goes_on(yardstick: Yardstick, values: Sequence[float], goes_on: bool) -> None:
    assert worth_going_on(values, yardstick) is goes_on


@pytest.mark.parametrize(
    ("yardstick", "values", "best"),
    [
        (ACCURACY, [0.5], 0),
        (ACCURACY, [0.5, 0.9, 0.8], 1),
        (ACCURACY, [0.9, 0.9], 1),
        (LOSS, [0.5, 0.4, 0.6], 1),
        (LOSS, [math.nan, 0.4], 1),
        (LOSS, [0.4, math.nan], 0),
    ],
)
def test_the_best_stage(yardstick: Yardstick, values: Sequence[float], best: int) -> None:
    assert best_stage(values, yardstick) == best


@pytest.mark.parametrize(("metric", "most"), [("accuracy", 1.05), ("pearson", 1.05)])
def test_standard_errors_are_those_of_samples(metric: str, most: float) -> None:
    """Against the spread of the metric over many random splits."""
    rng, rows = np.random.default_rng(0), 200
    if metric == "accuracy":
        value, seen = 0.8, rng.binomial(rows, 0.8, size=4000) / rows
    else:
        value = 0.6
        x, noise = rng.standard_normal((2, 4000, rows))
        y = value * x + math.sqrt(1 - value**2) * noise
        seen = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
    assert 1 / most < STANDARD_ERRORS[metric](value, rows) / seen.std() < most


def test_the_error_of_matthews_is_that_of_accuracy_at_even_classes() -> None:
    """A correlation of r there is an accuracy of (1 + r) / 2."""
    correlation = STANDARD_ERRORS["matthews_correlation"](0.6, 500)
    assert correlation == pytest.approx(2 * STANDARD_ERRORS["accuracy"](0.8, 500))
