"""Scores of slices that are measured together, against loops over single slices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice
from rgft.errors import InputError
from rgft.execution.binding import Binding, bind
from rgft.execution.measuring import Measuring, Scores
from rgft.signals import SIGNALS, Signal, Statistics, find_signal
from slicings import DTYPES, numbers, random_binding, random_gradients

# of a component's gradients, weights and updates, and of its number of elements
Oracle = Callable[[np.ndarray, np.ndarray, np.ndarray, int], float]
RANDOM = torch.Generator()


def norm(values: np.ndarray) -> float:
    return math.sqrt(math.fsum(values**2))


def square_roots(s: Statistics) -> Tensor:
    return s.sum(g.to(s.numel.dtype).abs().sqrt() for g in s.grads)


def relative_step(s: Statistics) -> Tensor:
    return s.norm(s.updates, 2) / s.norm(s.weights, 1)


CASES: dict[str, tuple[Signal, Oracle]] = {
    "1": (find_signal("grad-norm", 1), lambda g, w, u, n: math.fsum(abs(g))),
    "2": (find_signal("grad-norm", 2), lambda g, w, u, n: norm(g)),
    "inf": (find_signal("grad-norm", math.inf), lambda g, w, u, n: float(abs(g).max())),
    "rms": (SIGNALS["rms"], lambda g, w, u, n: norm(g) / math.sqrt(n)),
    "relative": (
        SIGNALS["relative"],
        lambda g, w, u, n: norm(g) / max(norm(w), 1e-3 * math.sqrt(n)),
    ),
    "taylor": (SIGNALS["taylor"], lambda g, w, u, n: abs(math.fsum(g * w))),
    "decrease": (SIGNALS["decrease"], lambda g, w, u, n: abs(math.fsum(g * u))),
    "own": (Signal(square_roots), lambda g, w, u, n: math.fsum(abs(g) ** 0.5)),
    "own update": (
        Signal(relative_step, "update"),
        lambda g, w, u, n: norm(u) / math.fsum(abs(w)),
    ),
}


def scored(
    measuring: Measuring, binding: Binding, optimizer: torch.optim.Optimizer
) -> tuple[Scores | None, list[dict[nn.Parameter, Tensor]]]:
    """Scores of one step; the gradients that there were, the weights and the updates."""
    parameters = binding.parameters.values()
    grads = {p: p.grad.clone() for p in parameters if p.grad is not None}
    weights = {p: p.detach().clone() for p in parameters}
    found = measuring.before_step(None)
    if measuring.signal.source == "update":
        assert found is None
        optimizer.step()
        found = measuring.after_step()
    return found, [grads, weights, {p: p.detach() - weights[p] for p in parameters}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_loops_over_slices(name: str, dtype: torch.dtype) -> None:
    signal, oracle = CASES[name]
    precision = 1e-12 if dtype == torch.float64 else 2e-5
    counts = {"scored": 0, "unobserved": 0, "no gradient": 0}
    for seed in range(25):
        binding, optimizer = random_binding(seed, dtype)
        measuring = Measuring(binding, signal, RANDOM)
        for step in range(3):  # each time other parameters have a gradient
            random_gradients(binding, 100 * seed + step, missing=0.5)
            found, tensors = scored(measuring, binding, optimizer)
            if found is None:
                assert not tensors[0]
                counts["no gradient"] += 1
                continue
            scores, observed = found
            assert not scores.requires_grad
            for k, component in enumerate(binding.components):
                own = [p for p in binding.pieces if p.component == k and p.parameter in tensors[0]]
                assert bool(observed[k]) == bool(own)
                counts["scored" if own else "unobserved"] += 1
                if own:
                    g, w, u = (numbers(own, t) for t in tensors)
                    wanted = oracle(g, w, u, component.numel)
                    # the terms of an inner product cancel
                    slack = {"taylor": abs(g) @ abs(w), "decrease": abs(g) @ abs(u)}.get(name, 0.0)
                    assert float(scores[k]) == pytest.approx(
                        wanted, rel=precision, abs=precision * float(slack)
                    )
    assert all(counts.values()), counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_that_are_still_scaled(dtype: torch.dtype) -> None:
    binding, _ = random_binding(3, dtype)
    measuring = Measuring(binding, find_signal("grad-norm", 2), RANDOM)
    random_gradients(binding, 3, missing=0.0)
    plain, scaled = (measuring.before_step(s) for s in (None, torch.tensor(0.25, dtype=dtype)))
    assert plain is not None
    assert scaled is not None
    torch.testing.assert_close(scaled[0], 0.25 * plain[0])


@pytest.mark.parametrize("seed", range(10))
def test_per_sample_scores_are_those_of_loops_over_slices(seed: int) -> None:
    binding, _ = random_binding(seed, torch.float64)
    parameters = list(binding.parameters.values())
    random = torch.Generator().manual_seed(seed)
    inputs = [
        [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]
        for _ in range(4)
    ]
    losses = (
        sum(((p * x).sin().sum() for p, x in zip(parameters, sample, strict=True)), torch.zeros(()))
        for sample in inputs
    )
    fisher, observed = Measuring(binding, SIGNALS["fisher"], RANDOM).from_samples(losses)
    assert observed.all()
    wanted = np.zeros(len(binding.components))
    for sample in inputs:
        gradient = {
            p: (x * (p * x).cos()).detach() for p, x in zip(parameters, sample, strict=True)
        }
        for piece in binding.pieces:
            wanted[piece.component] += float((numbers([piece], gradient) ** 2).sum()) / len(inputs)
    assert fisher.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)


def test_a_signal_sees_all_slices_of_a_parameter_at_once() -> None:
    """The cost of a step does not grow with the number of heads."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(600, 5))})
    parts = [ParameterSlice("w", 0, 2 * i, 2 * i + 2) for i in range(300)]
    components = [Component(str(i), "custom", 0, (part,), 10) for i, part in enumerate(parts)]
    binding = bind(model, torch.optim.SGD(model.parameters(), 0.1), components)
    seen: list[tuple[int, ...]] = []

    def signal(s: Statistics) -> Tensor:
        seen.extend(tuple(g.shape) for g in s.grads)
        return s.norm(s.grads, 2)

    model["w"].grad = torch.randn(600, 5)
    found = Measuring(binding, Signal(signal), RANDOM).before_step(None)
    assert found is not None
    assert seen == [(300, 2, 5)]
    torch.testing.assert_close(found[0], model["w"].grad.reshape(300, 10).norm(dim=1))


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    component = Component("a", "custom", 0, (ParameterSlice("weight"),), 8)
    binding = bind(model, torch.optim.SGD(model.parameters(), 0.1), [component])
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        Measuring(binding, SIGNALS["rms"], RANDOM).before_step(None)
