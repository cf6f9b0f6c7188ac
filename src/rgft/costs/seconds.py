r"""What a training step takes on the machine at hand, in seconds, from its FLOPs.

A few steps of different shapes and plans are timed, and

.. math:: t = t_0 + b \, c_{forward} + r \, c_{backward}

is fitted to them with no term below 0. Errors count relative to the time of their step, so that
short steps weigh as much as long ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from rgft.costs.graph import StepCost
from rgft.costs.model import CostModel
from rgft.errors import InputError

REPEATS = 3  # timings of each step, of which the median counts


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of the forward and backward pass of a step, by its FLOPs, on one machine.

    Attributes:
        start: Seconds of any step.
        forward: Seconds for each FLOP of the forward pass.
        backward: Seconds for each FLOP of the backward pass.
        error: Root of the mean squared relative error on the steps that it was fitted to.
    """

    start: float
    forward: float
    backward: float
    error: float = 0.0

    def predict(self, cost: StepCost) -> float:
        """Seconds of a step.

        >>> StepSeconds(0.01, 1e-9, 2e-9).predict(StepCost(10_000_000, 20_000_000))
        0.06
        """
        return self.start + self.forward * cost.forward + self.backward * cost.backward


def fit_seconds(costs: Sequence[StepCost], seconds: Sequence[float]) -> StepSeconds:
    """The seconds by FLOPs that fit timed steps best.

    Args:
        costs: FLOPs of each step.
        seconds: Its time, > 0.

    Raises:
        InputError: The steps are too alike to tell the terms apart.

    >>> costs = [StepCost(10, 0), StepCost(10, 20), StepCost(40, 0)]
    >>> fit = fit_seconds(costs, [1.5, 5.5, 3.0])
    >>> [round(x, 6) for x in (fit.start, fit.forward, fit.backward)]
    [1.0, 0.05, 0.2]
    """
    terms = np.array([[1.0, cost.forward, cost.backward] for cost in costs]).reshape(-1, 3)
    scaled = terms / np.array(seconds, dtype=np.float64)[:, None]
    unit = np.linalg.norm(scaled, axis=0)
    if not unit.all() or np.linalg.matrix_rank(scaled / unit) < 3:
        raise InputError(
            f"the {len(costs)} timed steps are too alike to tell forward from backward; time "
            "batches of two sizes or more, each with different parameters trained"
        )
    best, error = np.zeros(3), math.inf
    # with three terms, the optimum under the bounds is the free one of one of seven subsets
    for size in (1, 2, 3):
        for kept in map(list, combinations(range(3), size)):
            found = np.linalg.lstsq(scaled[:, kept] / unit[kept], np.ones(len(costs)), rcond=None)
            values = np.zeros(3)
            values[kept] = found[0] / unit[kept]
            left = float(np.sqrt(np.mean((scaled @ values - 1) ** 2)))
            if (values >= 0).all() and left < error:
                best, error = values, left
    start, forward, backward = best.tolist()
    return StepSeconds(start, forward, backward, error)


def calibrate(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    plans: Sequence[Collection[str]] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> StepSeconds:
    """Time a few steps of a model on this machine, and fit their seconds.

    The optimizer's step is not timed. The model is left as it was: weights, buffers, gradients,
    modes, and the random state.

    Args:
        model: Called as `model(**batch).loss`, like a model of transformers with labels.
        batches: Of two sizes or more, on the model's device.
        plans: Names of the parameters that train, for each kind of step; by default all, the
            upper half and the last two.
        clock: Seconds.

    Raises:
        InputError: The steps are too alike to tell forward from backward.
    """
    costs, names = CostModel(model), [name for name, _ in model.named_parameters()]
    plans = plans or (names, names[len(names) // 2 :], names[-2:])
    seen: list[tuple[StepCost, float]] = []
    with _borrowed(model):
        for batch in batches:
            graph = costs.graph(**batch)
            _step(model, batch, plans[0], clock)  # what happens the first time only
            for plan in plans:
                timed = [_step(model, batch, plan, clock) for _ in range(REPEATS)]
                seen.append((graph.cost(plan), median(timed)))
    return fit_seconds([cost for cost, _ in seen], [seconds for _, seconds in seen])


def _step(
    model: nn.Module, batch: Mapping[str, Any], trained: Collection[str], clock: Callable[[], float]
) -> float:
    """Seconds of one forward and backward pass."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.grad = None
    started = _now(model, clock)
    loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
    return _now(model, clock) - started


def _now(model: nn.Module, clock: Callable[[], float]) -> float:
    """The time when all that was asked of the device is done."""
    if next(model.parameters()).device.type != "cpu":
        torch.accelerator.synchronize()
    return clock()


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """In training mode for the block, and afterwards as before."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            model.train()
            yield
        finally:
            for parameter, required, gradient in parameters:
                parameter.requires_grad_(required)
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.data.copy_(value)
