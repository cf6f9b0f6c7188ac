"""Backward for part of a batch: its expectation by enumeration, and what it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from outcomes import offsets
from rgft import selective_backward
from rgft.errors import InputError
from rgft.sampling import keep_probability
from rgft.selective_backward import selective_loss

SIZE = 7


class Problem:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
        self.parameter = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
        self.calls: list[tuple[int, bool]] = []

    def losses_of(self, rows: Tensor) -> Tensor:
        self.calls.append((len(rows), torch.is_grad_enabled()))
        return (torch.tanh(self.inputs[rows] @ self.parameter) - 1).square()

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.parameter)[0]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_the_gradient_has_that_of_the_batch_as_expectation(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem()
    losses = problem.losses_of(torch.arange(SIZE))
    full = problem.gradient(losses.mean())
    everyone = torch.ones(SIZE, dtype=torch.bool)
    p = keep_probability(losses.detach(), everyone, skip=1 - share, rule="proportional")
    expected = torch.zeros_like(full)
    for chance, offset in offsets(p):
        at = torch.tensor(offset, dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(selective_backward.torch, "rand", lambda *_, at=at, **__: at)
            chosen = selective_loss(problem.losses_of, SIZE, share=share)
        assert abs(len(chosen.rows) - share * SIZE) < 1 + 1e-9
        if len(chosen.rows):
            expected += chance * problem.gradient(chosen.loss)
        else:
            assert chosen.loss == 0 and not chosen.loss.requires_grad
    assert torch.allclose(expected, full, rtol=0, atol=1e-12)


def test_the_hardest() -> None:
    problem = Problem()
    losses = problem.losses_of(torch.arange(SIZE))
    chosen = selective_loss(problem.losses_of, SIZE, share=0.4, unbiased=False)
    worst = losses.argsort(descending=True)[:3].sort().values
    assert torch.equal(chosen.rows, worst)
    assert torch.allclose(chosen.loss, losses[worst].mean())
    assert torch.equal(chosen.losses, losses.detach())
    one = selective_loss(problem.losses_of, SIZE, share=0.01, unbiased=False)
    assert one.rows.tolist() == [int(losses.argmax())]


def test_gradients_are_for_the_chosen_alone() -> None:
    problem = Problem()
    generator = torch.Generator().manual_seed(0)
    chosen = selective_loss(problem.losses_of, SIZE, share=0.5, generator=generator)
    assert problem.calls == [(SIZE, False), (len(chosen.rows), True)]
    assert not chosen.losses.requires_grad
    again = torch.Generator().manual_seed(0)
    assert torch.equal(
        selective_loss(problem.losses_of, SIZE, share=0.5, generator=again).rows, chosen.rows
    )


def test_all_of_a_batch_takes_one_pass() -> None:
    problem = Problem()
    chosen = selective_loss(problem.losses_of, SIZE, share=1)
    assert problem.calls == [(SIZE, True)]
    assert torch.equal(chosen.loss, problem.losses_of(torch.arange(SIZE)).mean())
    assert not chosen.losses.requires_grad


def test_it_costs_what_is_said() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(8)])
    inputs = torch.randn(64, 32)

    def losses_of(rows: Tensor) -> Tensor:
        return model(inputs[rows]).square().mean(1)

    def spent(share: float) -> int:
        with FlopCounterMode(display=False) as counter:
            selective_loss(losses_of, 64, share=share, unbiased=False).loss.backward()
        return counter.get_total_flops()

    assert spent(0.25) / spent(1.0) == pytest.approx((1 + 3 * 0.25) / 3, abs=0.02)


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    values = torch.tensor([1.0, torch.nan, 0.5, torch.inf])
    for unbiased in (True, False):
        chosen = selective_loss(lambda rows: values[rows], 4, share=0.5, unbiased=unbiased)
        assert {1, 3} <= set(chosen.rows.tolist())


@pytest.mark.parametrize("share", [0, -1, 1.1, True, "all", float("nan")])
def test_refuses_what_is_no_share(share: Any) -> None:
    with pytest.raises(InputError, match="share is"):
        selective_loss(Problem().losses_of, SIZE, share=share)


def test_refuses_losses_that_are_not_one_a_sample() -> None:
    with pytest.raises(InputError, match="for 4 samples"):
        selective_loss(lambda rows: torch.zeros(()), 4, share=0.5)
