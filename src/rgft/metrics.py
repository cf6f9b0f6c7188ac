"""What a model's predictions are worth: the metrics of a split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from rgft.tasks.task import Kind
from rgft.text_metrics import JUDGES, commonest_answer

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro", "matthews_correlation", "calibration_error"),
    "regression": ("pearson", "spearman", "mse"),
    "generation": tuple(JUDGES),
}

BINS = 15  # of confidence (Guo et al. 2017)

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


def compute(kind: Kind, predictions: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """The metrics `METRICS[kind]` of predictions against labels.

    Classification: accuracy is the share of right answers; macro F1 averages F1 = 2 TP / (2 TP +
    FP + FN) over the classes that occur among labels or answers; the Matthews correlation is
    that of the confusion matrix (Gorodkin 2004 for more than two classes); the expected
    calibration error sums |accuracy - mean confidence| over 15 bins of confidence, weighed by their
    shares of the rows (Guo et al. 2017). Regression: Pearson's r, Spearman's rho and
    mse = mean((y - f(x))^2), in squared units of the label.

    A correlation is undefined where one side is constant, or there are fewer than two rows; it
    is then 0. Predictions that are not finite come from a run that diverged: such a row is a wrong
    answer in full confidence in classification, and makes the correlations 0 and the mse infinite
    in regression.

    Args:
        kind: "classification" or "regression".
        predictions: Logits [rows, classes], or values [rows] or [rows, 1].
        labels: Class numbers or values, [rows].

    Raises:
        ValueError: There are no rows, or the shapes do not fit each other.

    >>> compute("classification", [[0.1, 0.9], [0.8, 0.2]], [1, 1])["accuracy"]
    0.5
    >>> compute("regression", [1.0, 2.0, 3.0], [2.0, 2.0, 5.0])["mse"]
    1.6666666666666667
    """
    values = np.asarray(predictions, dtype=np.float64)
    if kind == "classification":
        classes = np.asarray(labels, dtype=np.int64)
        if values.ndim != 2 or classes.shape != values.shape[:1] or values.size == 0:
            raise ValueError(
                f"logits {values.shape} and labels {classes.shape} must be [rows, classes] and "
                f"[rows], with at least one row"
            )
        return _classification(values, classes)
    targets = np.asarray(labels, dtype=np.float64)
    if values.shape == (*targets.shape, 1):
        values = values[:, 0]
    if targets.ndim != 1 or values.shape != targets.shape or targets.size == 0:
        raise ValueError(
            f"predictions {values.shape} and labels {targets.shape} must both be [rows], with at "
            f"least one row"
        )
    return _regression(values, targets)


def chance(kind: Kind, metric: str, labels: Sequence[Any]) -> float | None:
    """The metric of an answer that ignores its input; None where it is not known, as of ROUGE.

    The answer is the commonest class, the commonest final answer, or the same value everywhere.

    >>> chance("classification", "accuracy", [0, 1, 1, 1]), chance("generation", "rougeL", [["a"]])
    (0.75, None)
    """
    if kind == "generation":
        return commonest_answer(labels) if metric == "exact_match" else None
    if kind == "regression":
        return compute(kind, np.zeros(len(labels)), labels)[metric]
    counts = np.bincount(labels)
    answer = np.zeros((len(labels), len(counts)))
    answer[:, counts.argmax()] = 1.0
    return compute(kind, answer, labels)[metric]


def _classification(logits: _Floats, labels: _Ints) -> dict[str, float]:
    # -1 is no class: a row of logits with NaN or infinities is never right
    answers = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
    occurring = np.union1d(labels, answers[answers >= 0])
    f1 = sklearn_metrics.f1_score(
        labels, answers, labels=occurring, average="macro", zero_division=0.0
    )
    constant = np.ptp(labels) == 0 or np.ptp(answers) == 0
    matthews = 0.0 if constant else sklearn_metrics.matthews_corrcoef(labels, answers)
    return {
        "accuracy": float(np.mean(answers == labels)),
        "f1_macro": float(f1),
        "matthews_correlation": float(matthews),
        "calibration_error": _calibration_error(logits, answers == labels),
    }


def _calibration_error(logits: _Floats, right: npt.NDArray[np.bool_]) -> float:
    finite = np.isfinite(logits).all(axis=1)
    confidence = np.ones(len(logits))
    confidence[finite] = special.softmax(logits[finite], axis=1).max(axis=1)
    # bins are closed above, as in the paper: 1 is in the last one
    bins = np.ceil(confidence * BINS).astype(np.int64)
    gaps = np.bincount(bins, weights=right - confidence)
    return float(np.abs(gaps).sum() / len(logits))


def _regression(values: _Floats, targets: _Floats) -> dict[str, float]:
    if not np.isfinite(values).all():
        return {"pearson": 0.0, "spearman": 0.0, "mse": float("inf")}
    with np.errstate(over="ignore"):
        mse = float(np.mean((values - targets) ** 2))
    return {
        "pearson": _correlation(stats.pearsonr, values, targets),
        "spearman": _correlation(stats.spearmanr, values, targets),
        "mse": mse,
    }


def _correlation(
    measure: Callable[[_Floats, _Floats], tuple[float, float]], values: _Floats, targets: _Floats
) -> float:
    if np.ptp(values) == 0 or np.ptp(targets) == 0:
        return 0.0
    with warnings.catch_warnings():
        # scipy warns where values differ by rounding alone, and overflows where they are huge
        warnings.simplefilter("ignore")
        correlation = float(measure(values, targets)[0])
    return correlation if np.isfinite(correlation) else 0.0
