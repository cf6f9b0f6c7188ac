r"""Stages of a run that finds its own budget, and whether one more is worth its compute.

A run goes through stages that end at doubling shares of full fine-tuning. The learning rate rises
and falls to 0 in each of them (warm restarts whose periods double: Loshchilov & Hutter, "SGDR",
ICLR 2017), so that every stage ends with a model that could be the result. What the doubling has
bought is the gain of the validation metric v over the best stage before; it counts if it exceeds
one standard error,

.. math:: v_k - \max_{j<k} v_j > \sigma(\max_{j<k} v_j).

:math:`\sigma` is the standard error of the metric on a split of n rows. It stands for that of a
difference between two models on the same rows, :math:`\sigma\sqrt{2 (1 - \rho)}`, whose answers
correlate by :math:`\rho = 1/2`; stages of one run agree more than that, so it is a careful one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STAGES = (0.1, 0.2, 0.4, 0.8, 1.0)  # shares of full fine-tuning at which stages end
GAIN = 1.0  # standard errors that a stage must gain
ABOVE_CHANCE = 2.0  # standard errors by which a model must beat an answer that ignores its input
RELATIVE_GAIN = 0.01  # of the value, for a metric whose standard error is not known
PATIENCE = 2  # stages in a row without gain that end a run where chance is not known

# From a value and the number of rows. Accuracy and exact match: binomial. Matthews: accuracy
# (1 + r) / 2 at even classes. Pearson: of normal variables; Spearman's is nearly the same.
STANDARD_ERRORS: Mapping[str, Callable[[float, int], float]] = {
    "accuracy": lambda p, n: math.sqrt(max(0.0, p * (1 - p)) / n),
    "exact_match": lambda p, n: math.sqrt(max(0.0, p * (1 - p)) / n),
    "matthews_correlation": lambda r, n: math.sqrt(max(0.0, 1 - r * r) / n),
    "pearson": lambda r, n: max(0.0, 1 - r * r) / math.sqrt(n),
    "spearman": lambda r, n: max(0.0, 1 - r * r) / math.sqrt(n),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that has ended.

    Attributes:
        share: Of the FLOPs of full fine-tuning, spent by its end.
        validation: The validation metric of its model.
    """

    share: float
    validation: float


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What stages are judged by.

    Attributes:
        metric: Name of the validation metric.
        rows: Of the validation split; None where they are not known.
        chance: The metric of the best answer that ignores its input; None where it is not known.
        lower_is_better: As with a loss.
    """

    metric: str = "loss"
    rows: int | None = None
    chance: float | None = None
    lower_is_better: bool = False

    def threshold(self, value: float) -> float:
        """What a stage must gain over `value`.

        >>> round(Yardstick("accuracy", rows=900).threshold(0.9), 4), Yardstick().threshold(0.5)
        (0.01, 0.005)
        """
        if not math.isfinite(value):
            return 0.0
        if self.rows and self.metric in STANDARD_ERRORS:
            return GAIN * STANDARD_ERRORS[self.metric](value, self.rows)
        return RELATIVE_GAIN * abs(value)

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is; a value that is not finite is no better than any."""
        if not math.isfinite(value):
            return -math.inf
        if not math.isfinite(over):
            return math.inf
        return over - value if self.lower_is_better else value - over

    def at_chance(self, value: float) -> bool:
        """Whether `value` is no better than chance, within two standard errors; as far as known.

        >>> accuracy = Yardstick("accuracy", rows=900, chance=0.5)
        >>> accuracy.at_chance(0.53), accuracy.at_chance(0.54)
        (True, False)
        """
        if self.chance is None:
            return False
        margin = ABOVE_CHANCE / GAIN * self.threshold(self.chance)
        return self.gain(value, self.chance) <= margin


def best_stage(values: Sequence[float], yardstick: Yardstick) -> int:
    """Position of the best value, the latest among equals.

    >>> best_stage([0.5, 0.9, 0.9, 0.8], Yardstick("accuracy"))
    2
    """
    best = 0
    for index, value in enumerate(values):
        if yardstick.gain(value, values[best]) >= 0:
            best = index
    return best


def worth_going_on(values: Sequence[float], yardstick: Yardstick) -> bool:
    """Whether to run another stage.

    Not after a stage that gained too little, nor where there is too little left to gain. But a
    model at chance is worth nothing: nothing is saved by keeping it, so the run goes on. Where
    chance is not known, it takes two stages in a row without gain to end the run.

    Args:
        values: The validation metric at the end of each stage so far, at least one.
        yardstick: What they are judged by.

    >>> accuracy = Yardstick("accuracy", rows=900, chance=0.5)
    >>> [worth_going_on(v, accuracy) for v in ([0.5, 0.5], [0.5, 0.8], [0.5, 0.8, 0.81])]
    [True, True, False]
    """
    best = values[best_stage(values, yardstick)]
    if not math.isfinite(best) or yardstick.at_chance(best):
        return True
    bounded = yardstick.rows and yardstick.metric in STANDARD_ERRORS  # 1 is the best there is
    if bounded and 1.0 - best <= yardstick.threshold(best):
        return False
    gained = []
    for index in range(1, len(values)):
        before = values[best_stage(values[:index], yardstick)]
        gained.append(yardstick.gain(values[index], before) > yardstick.threshold(before))
    patience = PATIENCE if yardstick.chance is None else 1
    return len(gained) < patience or any(gained[-patience:])
