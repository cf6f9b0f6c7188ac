"""Metrics against brute force, and their values where they are undefined."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from rgft.metrics import METRICS, compute

ANSWERS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


def logits_for(answers: list[int], classes: int = 4) -> np.ndarray:
    return np.eye(classes)[answers] * 3.0 - 1.0


def brute_f1_macro(labels: list[int], answers: list[int]) -> float:
    scores = []
    for one in set(labels) | set(answers):
        hits = sum(a == one == y for y, a in zip(labels, answers, strict=True))
        scores.append(2 * hits / (labels.count(one) + answers.count(one)))
    return sum(scores) / len(scores)


def brute_pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / math.sqrt((x @ x) * (y @ y)))


@given(ANSWERS)
def test_classification_agrees_with_brute_force(pairs: list[tuple[int, int]]) -> None:
    labels, answers = [y for y, _ in pairs], [a for _, a in pairs]
    found = compute("classification", logits_for(answers), labels)
    assert set(found) == set(METRICS["classification"])
    assert found["accuracy"] == pytest.approx(
        sum(y == a for y, a in zip(labels, answers, strict=True)) / len(labels)
    )
    assert found["f1_macro"] == pytest.approx(brute_f1_macro(labels, answers))
    # Matthews' correlation of k classes is Pearson's r of the one-hot codes, centred by column
    y, a = np.eye(4)[labels], np.eye(4)[answers]
    y, a = y - y.mean(0), a - a.mean(0)
    scale = math.sqrt((y * y).sum() * (a * a).sum())
    expected = (y * a).sum() / scale if scale > 1e-12 else 0.0
    assert found["matthews_correlation"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 5])
def test_calibration_error_is_that_of_torchmetrics(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.normal(scale=2, size=(300, classes))
    labels = rng.integers(classes, size=300)
    found = compute("classification", logits, labels)["calibration_error"]
    theirs = multiclass_calibration_error(
        torch.tensor(logits).softmax(1), torch.tensor(labels), classes, n_bins=15
    )
    assert found == pytest.approx(float(theirs), abs=1e-6)


def test_confidence_that_is_right_is_calibrated() -> None:
    """Three of four right at 75%, and all right at full confidence."""
    logits = [[math.log(3), 0.0]] * 4 + [[800.0, 0.0]] * 2
    found = compute("classification", logits, [0, 0, 0, 1, 0, 0])
    assert found["calibration_error"] == pytest.approx(0, abs=1e-12)


def test_regression_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=50)
    x = y + rng.normal(size=50)
    found = compute("regression", x, y)
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (x, y)]
    assert set(found) == set(METRICS["regression"])
    assert found["pearson"] == pytest.approx(brute_pearson(x, y))
    assert found["spearman"] == pytest.approx(brute_pearson(*ranks))
    assert found["mse"] == pytest.approx(sum((p - t) ** 2 for p, t in zip(x, y, strict=True)) / 50)
    assert compute("regression", x[:, None], y) == found


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20))
def test_regression_is_always_finite_without_warnings(pairs: list[tuple[float, float]]) -> None:
    found = compute("regression", [p for p, _ in pairs], [t for _, t in pairs])
    assert all(math.isfinite(value) for value in found.values())
    assert all(-1 - 1e-9 <= found[name] <= 1 + 1e-9 for name in ("pearson", "spearman"))


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [5.0, 5.0]), ([1.0], [2.0])],
)
def test_undefined_correlations_are_zero(predictions: list[float], labels: list[float]) -> None:
    found = compute("regression", predictions, labels)
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert found["mse"] > 0


def test_one_answer_for_everything_has_no_matthews_correlation() -> None:
    found = compute("classification", logits_for([1, 1, 1]), [1, 0, 1])
    assert found["matthews_correlation"] == 0.0
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_a_diverged_run_scores_badly_rather_than_well() -> None:
    logits = np.full((3, 2), np.nan)
    # NaN everywhere would otherwise count as class 0, which is right in every row here
    found = compute("classification", logits, [0, 0, 0])
    worst = {"accuracy": 0.0, "f1_macro": 0.0, "matthews_correlation": 0.0}
    assert found == {**worst, "calibration_error": 1.0}
    found = compute("regression", [1.0, math.nan, 3.0], [1.0, 2.0, 3.0])
    assert found == {"pearson": 0.0, "spearman": 0.0, "mse": math.inf}


def test_partly_diverged_rows_are_wrong_answers() -> None:
    logits = logits_for([0, 1, 2, 2])
    logits[3, 0] = np.inf
    found = compute("classification", logits, [0, 1, 2, 2])
    assert found["accuracy"] == 0.75
    assert found["f1_macro"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert found["matthews_correlation"] == pytest.approx(
        sklearn_metrics.matthews_corrcoef([0, 1, 2, 2], [0, 1, 2, -1])
    )


@pytest.mark.parametrize(
    ("kind", "predictions", "labels"),
    [
        ("classification", [[1.0, 2.0]], [0, 1]),
        ("classification", [1.0, 2.0], [0, 1]),
        ("classification", np.zeros((0, 2)), []),
        ("regression", [1.0, 2.0], [1.0]),
        ("regression", [[1.0, 2.0]], [1.0]),
        ("regression", [], []),
    ],
)
def test_shapes_that_do_not_fit_are_refused(kind: str, predictions: object, labels: object) -> None:
    with pytest.raises(ValueError, match="rows"):
        compute(kind, predictions, labels)  # type: ignore[arg-type]
