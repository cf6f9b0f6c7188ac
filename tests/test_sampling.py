"""Which samples are visited: expectations by enumeration of every outcome, in double precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outcomes import offsets
from rgft.errors import InputError
from rgft.sampling import (
    RULES,
    below_mean,
    keep_probability,
    proportional,
    systematic,
    weighted_loss,
    weights,
)

exact = settings(derandomize=True, deadline=None, max_examples=80)
RESIDUAL = torch.tensor([0.1, 0.7, 0.2, 3.0, 0.0, 1.1], dtype=torch.float64)
SEEN = torch.tensor([True, True, True, True, True, False])
residual_lists = st.lists(st.floats(0, 100), min_size=1, max_size=30)
skips = st.floats(0, 0.95)


def gradients(size: int) -> Tensor:
    """Each sample's gradient of a small non-linear model, `[N, parameters]`."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (4,))
    )
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    first.requires_grad_(), second.requires_grad_()
    losses = (torch.tanh(inputs @ first) @ second - 1).square()
    rows = [torch.autograd.grad(loss, (first, second), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("skip", [0.0, 0.3, 0.5, 0.9])
def test_independent_draws_have_the_full_gradient_as_expectation(rule: str, skip: float) -> None:
    p = keep_probability(RESIDUAL, SEEN, skip=skip, rule=rule)
    gradient, weight = gradients(6), weights(p)
    expected, total = torch.zeros_like(gradient[0]), 0.0
    for kept in itertools.product([False, True], repeat=6):
        mask = torch.tensor(kept)
        chance = torch.where(mask, p, 1 - p).prod().item()
        expected += chance * (weight[mask, None] * gradient[mask]).sum(0)
        total += chance
    assert total == pytest.approx(1, abs=1e-12)
    assert torch.allclose(expected, gradient.sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("skip", [0.0, 0.3, 0.5, 0.9])
def test_the_systematic_draw_has_it_too_in_any_order(rule: str, skip: float) -> None:
    p = keep_probability(RESIDUAL, SEEN, skip=skip, rule=rule)
    gradient, weight = gradients(6), weights(p)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        rows = torch.tensor(order)
        expected = torch.zeros_like(gradient[0])
        for chance, offset in offsets(p[rows]):
            visited = rows[systematic(p[rows], offset)]
            expected += chance * (weight[visited, None] * gradient[visited]).sum(0)
        assert torch.allclose(expected, gradient.sum(0), rtol=0, atol=1e-12)


def test_without_weights_the_expectation_is_another() -> None:
    p = keep_probability(RESIDUAL, SEEN, skip=0.5)
    gradient = gradients(6)
    biased = (p * weights(p, unbiased=False)) @ gradient
    assert weights(p, unbiased=False).tolist() == [1.0] * 6
    assert not torch.allclose(biased, gradient.sum(0), rtol=0, atol=1e-3)


@exact
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.floats(0, 1, exclude_max=True))
def test_a_systematic_draw_is_of_fixed_size(values: list[float], offset: float) -> None:
    p = torch.tensor(values, dtype=torch.float64)
    kept = systematic(p, offset)
    assert kept[p >= 1].all()
    assert abs(int(kept.sum()) - float(p.sum())) < 1 + 1e-9
    # point by point: i is kept if some offset + k lies within its piece of the line
    loose, start = [], 0.0
    for value in (v for v in values if v < 1):
        loose.append((start, start + value))
        start += value
    points = [offset + k for k in range(len(values) + 1)]
    near = any(abs(edge - x) < 1e-9 for piece in loose for edge in piece for x in points)
    if not near:
        wanted = [any(low <= x < high for x in points) for low, high in loose]
        assert kept[p < 1].tolist() == wanted


@exact
@given(residual_lists, skips)
def test_below_mean_is_its_formula(values: list[float], skip: float) -> None:
    residual = torch.tensor(values, dtype=torch.float64)
    mean = math.fsum(values) / len(values)
    found = below_mean(residual, skip).tolist()
    for value, p in zip(values, found, strict=True):
        if abs(value - mean) > 1e-9 * max(1, mean):
            assert p == (1 - skip if value < mean else 1.0)
    assert max(found) == 1.0  # something is at the mean or above, rounding or not


@pytest.mark.parametrize(("count", "value"), [(3, 0.1), (3, 0.2), (7, 0.7), (9, 0.3)])
def test_equal_residuals_are_all_kept_though_their_mean_rounds_up(count: int, value: float) -> None:
    residual = torch.full((count,), value, dtype=torch.float64)
    assert residual.mean() >= value
    assert below_mean(residual, 0.5).tolist() == [1.0] * count


@exact
@given(residual_lists, skips, st.floats(0.05, 1))
def test_proportional_has_its_mean_and_its_bounds(
    values: list[float], skip: float, floor: float
) -> None:
    residual = torch.tensor(values, dtype=torch.float64)
    p = proportional(residual, skip, floor)
    assert p.mean().item() == pytest.approx(1 - skip, abs=1e-9)
    assert p.min() >= floor * (1 - skip) * (1 - 1e-12)
    assert p.max() <= 1
    order = residual.argsort()
    assert (p[order].diff() >= 0).all()
    inside = (p > floor * (1 - skip) * (1 + 1e-9)) & (p < 1 - 1e-9) & (residual > 1e-9)
    ratios = p[inside] / residual[inside]
    assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-6)


def test_what_is_unseen_is_always_visited() -> None:
    for rule in RULES:
        assert keep_probability(RESIDUAL, SEEN, skip=0.9, rule=rule)[5] == 1
    nowhere = torch.zeros(6, dtype=torch.bool)
    unknown = torch.full((6,), torch.nan)
    assert keep_probability(unknown, nowhere, skip=0.9).tolist() == [1.0] * 6


def test_a_rule_of_ones_own() -> None:
    found = keep_probability(RESIDUAL, SEEN, skip=0.25, rule=lambda r, s: torch.full_like(r, 1 - s))
    assert found.tolist() == [0.75] * 5 + [1.0]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_a_rule_that_gives_no_probabilities_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="probability in"):
        keep_probability(RESIDUAL, SEEN, skip=0.5, rule=lambda r, _: torch.full_like(r, value))


@pytest.mark.parametrize("skip", [1, 1.0, -0.1, math.nan, True, "0.5"])
def test_refuses_what_is_no_share(skip: Any) -> None:
    with pytest.raises(InputError, match="skip is"):
        keep_probability(RESIDUAL, SEEN, skip=skip)


def test_refuses_unknown_rules_and_what_they_cannot_take() -> None:
    with pytest.raises(InputError, match="allowed: below-mean, proportional"):
        keep_probability(RESIDUAL, SEEN, skip=0.5, rule="below")
    with pytest.raises(InputError, match="not negative"):
        keep_probability(-RESIDUAL - 1, SEEN, skip=0.5, rule="proportional")
    with pytest.raises(InputError, match="floor is 0"):
        proportional(RESIDUAL, 0.5, floor=0)


def test_a_weighted_loss_divides_by_the_full_batch() -> None:
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = weighted_loss(losses, torch.tensor([2.0, 1.0], dtype=torch.float64), 4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 1.25
    assert losses.grad is not None and losses.grad.tolist() == [0.5, 0.25]
