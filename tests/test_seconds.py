"""Seconds from FLOPs: the fit against scipy, calibration by a clock that counts real FLOPs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

from flops import ON_CPU
from rgft import CostModel, InputError
from rgft.costs import StepCost, StepSeconds, calibrate, fit_seconds
from tiny import bert

COSTS = [StepCost(f, b) for f in (10**9, 3 * 10**9, 10**10) for b in (0, f // 2, 2 * f)]


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).reshape(rows, length) % 20
    return {"input_ids": ids, "labels": torch.arange(rows) % 2}


def test_a_line_is_found_again() -> None:
    true = StepSeconds(0.02, 3e-11, 5e-11)
    found = fit_seconds(COSTS, [true.predict(cost) for cost in COSTS])
    assert found.start == pytest.approx(0.02)
    assert found.forward == pytest.approx(3e-11)
    assert found.backward == pytest.approx(5e-11)
    assert found.error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_fit_is_the_best_without_negative_terms(seed: int) -> None:
    """Noise so large that the free optimum often has them; scipy solves the same problem."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(0.01, 0.5, size=len(COSTS))
    terms = np.array([[1.0, cost.forward / 1e9, cost.backward / 1e9] for cost in COSTS])
    expected, left = nnls(terms / seconds[:, None], np.ones(len(COSTS)))
    found = fit_seconds(COSTS, seconds.tolist())
    assert [found.start, found.forward * 1e9, found.backward * 1e9] == pytest.approx(
        expected.tolist(), abs=1e-9
    )
    assert found.error == pytest.approx(left / np.sqrt(len(COSTS)))


@pytest.mark.parametrize(
    "costs", [[], COSTS[:2], [StepCost(1, 2), StepCost(2, 4), StepCost(3, 6)], [StepCost(5, 0)] * 9]
)
def test_steps_that_are_too_alike(costs: list[StepCost]) -> None:
    with pytest.raises(InputError, match=f"the {len(costs)} timed steps are too alike"):
        fit_seconds(costs, [1.0] * len(costs))


class Work:
    """A clock driven by the FLOPs that torch counts, and by calls of the model."""

    def __init__(self, model: torch.nn.Module, start: float, each: float) -> None:
        self.mode = FlopCounterMode(display=False, custom_mapping=ON_CPU)
        self.calls, self._start, self._each = 0, start, each
        self._handle = model.register_forward_hook(self._called)

    def _called(self, *call: Any) -> None:
        del call
        self.calls += 1

    def __call__(self) -> float:
        return self.calls * self._start + self.mode.get_total_flops() * self._each


def test_calibration_finds_what_the_clock_goes_by() -> None:
    model = bert()
    clock = Work(model, 0.004, 1e-8)
    batches = [batch(2, 8), batch(4, 8), batch(4, 16)]
    with clock.mode:
        found = calibrate(model, batches, clock=clock)
    assert found.start == pytest.approx(0.004, rel=1e-6)
    assert found.forward == pytest.approx(1e-8, rel=1e-6)
    assert found.backward == pytest.approx(1e-8, rel=1e-6)
    costs = CostModel(model)
    step = costs.graph(**batch(8, 16)).cost(costs.names)
    assert found.predict(step) == pytest.approx(0.004 + 1e-8 * step.total, rel=1e-6)


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = bert().eval()
    model.register_buffer("seen", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: module.seen.add_(1) and None)
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    calibrate(model, [batch(2, 8), batch(4, 8), batch(4, 16)])
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * len(others)
    assert torch.equal(others[0].grad, torch.ones_like(others[0]))
    assert all(p.grad is None for p in others[1:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
