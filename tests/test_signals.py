"""Signals against loops over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgft import SIGNALS, Config, Guide, InputError, Signal, Statistics
from rgft.signals import find_signal
from tiny import mlp, mlp_batches

exact = settings(derandomize=True, deadline=None, max_examples=50)
PRECISION = {torch.float64: (1e-12, 120), torch.float32: (2e-5, 15)}


@st.composite
def slices(draw: Any, dtype: torch.dtype) -> tuple[list[int], list[list[np.ndarray]], Statistics]:
    """Gradients, weights and updates of slices of any shape, with zeros and any size."""
    components = draw(st.integers(1, 4))
    extra = draw(st.lists(st.integers(0, components - 1), max_size=4))
    owner = sorted([*range(components), *extra])
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    shapes = [draw(st.lists(st.integers(1, 4), max_size=3)) for _ in owner]
    largest = PRECISION[dtype][1]
    groups: list[list[np.ndarray]] = []
    for _ in range(3):
        magnitude = 10.0 ** draw(st.integers(-largest, largest) | st.sampled_from([-largest, 0]))
        zero = [draw(st.booleans()) and draw(st.booleans()) for _ in owner]
        groups.append(
            [
                np.zeros(s) if z else random.standard_normal(s) * magnitude
                for s, z in zip(shapes, zero, strict=True)
            ]
        )
    tensors = [[torch.tensor(a, dtype=dtype) for a in group] for group in groups]
    numel = [
        sum(a.size for a, o in zip(groups[0], owner, strict=True) if o == k)
        for k in range(components)
    ]
    statistics = Statistics(
        torch.tensor(owner),
        torch.tensor(numel, dtype=dtype),
        torch.Generator().manual_seed(0),
        *tensors,
    )
    return owner, [[t.double().numpy() for t in group] for group in tensors], statistics


def entries(owner: list[int], arrays: Iterable[np.ndarray], k: int) -> list[float]:
    return [float(x) for o, a in zip(owner, arrays, strict=True) if o == k for x in np.ravel(a)]


def p_norm(values: list[float], p: float) -> float:
    """Scaled, so that neither squares of 1e120 nor of 1e-120 leave the range of numbers."""
    top = max(map(abs, values))
    if top == 0 or p == math.inf:
        return top
    return top * math.fsum((abs(x) / top) ** p for x in values) ** (1 / p)


def check(found: Tensor, wanted: list[float], dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx(wanted, rel=PRECISION[dtype][0], abs=0)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("p", [1, 2, math.inf])
@exact
@given(data=st.data())
def test_grad_norm(dtype: torch.dtype, p: float, data: st.DataObject) -> None:
    owner, (grads, _, _), statistics = data.draw(slices(dtype))
    wanted = [p_norm(entries(owner, grads, k), p) for k in range(max(owner) + 1)]
    check(find_signal("grad-norm", p).score(statistics), wanted, dtype)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@exact
@given(data=st.data())
def test_rms_and_relative(dtype: torch.dtype, data: st.DataObject) -> None:
    owner, (grads, weights, _), statistics = data.draw(slices(dtype))
    rms, relative = [], []
    for k in range(max(owner) + 1):
        g, w = entries(owner, grads, k), entries(owner, weights, k)
        rms.append(p_norm(g, 2) / math.sqrt(len(g)))
        relative.append(rms[-1] / max(p_norm(w, 2) / math.sqrt(len(w)), 1e-3))
    check(SIGNALS["rms"].score(statistics), rms, dtype)
    check(SIGNALS["relative"].score(statistics), relative, dtype)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(("signal", "other"), [("taylor", 1), ("decrease", 2)])
@exact
@given(data=st.data())
def test_taylor_and_decrease(
    dtype: torch.dtype, signal: str, other: int, data: st.DataObject
) -> None:
    owner, groups, statistics = data.draw(slices(dtype))
    found = SIGNALS[signal].score(statistics)
    for k in range(max(owner) + 1):
        pairs = zip(entries(owner, groups[0], k), entries(owner, groups[other], k), strict=True)
        products = [a * b for a, b in pairs]
        # terms of both signs cancel: the error is relative to the sum of their sizes
        slack = PRECISION[dtype][0] * math.fsum(map(abs, products))
        slack += float(torch.finfo(dtype).tiny) * len(products)
        assert abs(float(found[k]) - abs(math.fsum(products))) <= slack


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_gives_a_score_that_is_not(p: float, bad: float) -> None:
    grads = [torch.ones(3), torch.tensor([1.0, bad]), torch.ones(2)]
    statistics = Statistics(
        torch.tensor([0, 0, 1]), torch.tensor([5.0, 2.0]), torch.Generator(), grads=grads
    )
    score = find_signal("grad-norm", p).score(statistics)
    assert torch.isfinite(score).tolist() == [False, True]


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_stack_of_slices_scores_as_its_slices_do(p: float) -> None:
    random = torch.Generator().manual_seed(0)
    shapes: list[tuple[tuple[int, ...], int | None]] = [
        ((3,), 0), ((2, 3), None), ((4, 3), 0), ((3, 4), 1), ((2, 5, 2), 1), ((), None)
    ]  # fmt: skip
    stacks = [torch.randn(shape, generator=random) for shape, _ in shapes]
    dims = [dim for _, dim in shapes]
    each = [t.unbind(d) if d is not None else (t,) for t, d in zip(stacks, dims, strict=True)]
    slices = [s for unbound in each for s in unbound]
    owner = torch.randint(3, (len(slices),), generator=random)
    numel = torch.tensor([float(sum(s.numel() for s in slices))] * 3)
    stacked = Statistics(owner, numel, torch.Generator(), stacked=dims)
    plain = Statistics(owner, numel, torch.Generator())
    torch.testing.assert_close(stacked.norm(stacks, p), plain.norm(slices, p))
    torch.testing.assert_close(stacked.sum(stacks), plain.sum(slices))
    torch.testing.assert_close(stacked.dot(stacks, stacks), plain.dot(slices, slices))
    with pytest.raises(ValueError, match="argument 2 is"):
        stacked.norm(stacks[:-1], p)
    with pytest.raises(ValueError, match="argument 2 is"):
        stacked.sum(stacks[:-1])


def test_controls() -> None:
    generator = torch.Generator().manual_seed(5)
    statistics = Statistics(torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64), generator)
    assert SIGNALS["constant"].score(statistics).tolist() == [1.0, 1.0]
    first, second = (SIGNALS["random"].score(statistics) for _ in range(2))
    assert not torch.equal(first, second)
    generator.manual_seed(5)
    assert torch.equal(SIGNALS["random"].score(statistics), first)
    assert ((first >= 0) & (first < 1)).all()


# -- per-sample signals, through the guide ----------------------------------------------------


def by_loops(model: nn.Sequential, samples: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Fisher trace and signal-to-noise of the three layers, one sample at a time."""
    rows: list[list[np.ndarray]] = [[], [], []]
    for x, y in samples:
        loss = (model(x) - y).square().mean()
        for k, layer in enumerate((model[0], model[2], model[4])):
            grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            rows[k].append(np.concatenate([g.double().numpy().ravel() for g in grads]))
    fisher, ratio = [], []
    for layer_rows in rows:
        g = np.stack(layer_rows)
        fisher.append(float((g**2).sum(1).mean()))
        variance = float(g.var(0, ddof=1).sum()) if len(g) > 1 else 0.0
        ratio.append(float((g.mean(0) ** 2).sum()) / variance if variance else 0.0)
    return {"fisher": fisher, "signal-to-noise": ratio}


@pytest.mark.parametrize("signal", ["fisher", "signal-to-noise"])
@pytest.mark.parametrize("policy", ["normalized-max", "head-only"])
@pytest.mark.parametrize("count", [2, 7])
def test_per_sample_signals(signal: str, policy: str, count: int) -> None:
    model = mlp()
    x, y = mlp_batches(1)[0]
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(count)]

    def probe(n: int) -> Iterable[Tensor]:
        assert n == count
        return ((model(a) - b).square().mean() for a, b in samples)

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    config = Config(signal=signal, policy=policy, every=2, probe_samples=count, beta=0.0)
    guide = Guide(model, optimizer, config, probe=probe)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    trained = [p.requires_grad for p in model.parameters()]
    assert trained == ([False] * 4 + [True] * 2 if policy == "head-only" else [True] * 6)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    wanted = by_loops(model, samples)[signal]
    assert guide.error_map.values.tolist() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("same", [1, 5])
def test_signal_to_noise_without_noise_is_zero(dtype: torch.dtype, same: int) -> None:
    """One sample, or equal ones, have no variance; rounding must not pass for one."""
    for seed in range(20):
        g = torch.randn(97, generator=torch.Generator().manual_seed(seed)).to(dtype)
        statistics = Statistics(
            torch.tensor([0]),
            torch.tensor([97.0], dtype=dtype),
            torch.Generator(),
            mean_grads=[torch.stack([g] * same).sum(0) / same],
            mean_square=sum(g.norm() ** 2 for _ in range(same)).reshape(1) / same,
            samples=same,
        )
        assert SIGNALS["signal-to-noise"].score(statistics).tolist() == [0.0]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (lambda _: iter(()), "no sample"),
        (lambda _: [torch.ones(())], "scalar"),
        (lambda _: [torch.ones(2, requires_grad=True)], "scalar"),
    ],
)
def test_probes_that_cannot_be_used_are_refused(probe: Any, message: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Guide(model, optimizer, Config(signal="fisher", every=1), probe=probe)
    x, y = mlp_batches(1)[0]
    (model(x) - y).square().mean().backward()
    with pytest.raises(InputError, match=message) as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)


# -- finding them -----------------------------------------------------------------------------


def test_find_signal() -> None:
    own = SIGNALS["constant"].score
    assert find_signal(own, 2) == Signal(own)
    assert find_signal(Signal(own, "update"), 2).source == "update"
    assert {name for name in SIGNALS if find_signal(name, 2).source != "gradient"} == {
        "decrease",
        "fisher",
        "improvement",
        "signal-to-noise",
    }
    with pytest.raises(
        InputError, match="unknown signal 'loudness'; allowed: grad-norm, "
    ) as caught:
        find_signal("loudness", 2)
    assert "\n" not in str(caught.value)


def test_products_of_half_precision_numbers_do_not_underflow() -> None:
    tiny = [torch.full((4,), 1e-4, dtype=torch.float16)]
    statistics = Statistics(
        torch.tensor([0]), torch.tensor([4.0]), torch.Generator(), grads=tiny, weights=tiny
    )
    assert SIGNALS["taylor"].score(statistics).item() == pytest.approx(4e-8, rel=0.02)
