"""Policies against their formulas, written as plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgft import POLICIES, Component, Config, InputError, Situation
from rgft.components import ParameterSlice
from rgft.costs import ComponentCosts
from rgft.policies import find_policy
from rgft.policies.options import hold, mean_one

exact = settings(derandomize=True, deadline=None, max_examples=60)
# Few distinct values, so that ties and zeros are common; and any size.
errors = st.lists(
    st.sampled_from([0.0, 1.0, 2.0]) | st.floats(1e-120, 1e120), min_size=1, max_size=12
)
alphas = st.sampled_from([0.0, 0.5, 1.0, 3.0])
shares = st.floats(0.01, 1.0)
floors = st.sampled_from([0.0, 0.1, 1.0])


def situation(
    error: list[float], step: int = 0, seed: int = 0, heads: int = 0, kind: str = "layer"
) -> Situation:
    """Components by depth; the last `heads` of them always train."""
    size = len(error)
    kinds = [kind] * (size - heads) + ["head"] * heads
    return Situation(
        error=torch.tensor(error, dtype=torch.float64),
        components=tuple(Component(f"c{k}", kinds[k], k // 2, (), 1) for k in range(size)),
        always=torch.tensor([kind == "head" for kind in kinds]),
        never=torch.zeros(size, dtype=torch.bool),
        step=step,
        total_steps=100,
        generator=torch.Generator().manual_seed(seed),
        trained=torch.ones(size, dtype=torch.bool),
        costs=ComponentCosts(size, 0.3, {1 << k: 0.7 / size for k in range(size)}),
        progress=0.0,
    )


def decide(policy: str, where: Situation, **given_settings: Any) -> list[float]:
    config = Config(policy=policy, total_steps=100, **given_settings)
    result = find_policy(config).lr_scale(where).double()
    assert result.shape == where.error.shape
    return list(result.tolist())


def close(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def of_parameters(*names: str, heads: int = 1) -> Situation:
    """One component a parameter, of which the last `heads` always train."""
    where = situation([0.0] * len(names), heads=heads)
    parts = zip(where.components, names, strict=True)
    named = (replace(c, slices=(ParameterSlice(name),)) for c, name in parts)
    return replace(where, components=tuple(named))


def test_biases_and_the_head_alone_train() -> None:
    where = of_parameters("norm.bias", "norm.weight", "query.bias", "bias.weight", "head.weight")
    assert decide("biases", where) == [1, 0, 1, 0, 1]


def test_a_model_without_biases_is_refused() -> None:
    where = of_parameters("query.weight", "head.bias")
    with pytest.raises(InputError, match="no component that holds biases alone"):
        decide("biases", where)


@exact
@given(errors, alphas)
def test_normalized_max(error: list[float], alpha: float) -> None:
    top = max(error)
    wanted = [1 + alpha * e / top if top else 1.0 for e in error]
    close(decide("normalized-max", situation(error), alpha=alpha), wanted)


@exact
@given(errors, alphas)
def test_normalized_sum(error: list[float], alpha: float) -> None:
    total = math.fsum(error)
    wanted = [1 + alpha * len(error) * (e / total) if total else 1.0 for e in error]
    found = decide("normalized-sum", situation(error), alpha=alpha)
    close(found, wanted)
    if total:
        assert sum(found) / len(found) == pytest.approx(1 + alpha)


@exact
@given(errors, alphas)
def test_rank(error: list[float], alpha: float) -> None:
    size = len(error)
    wanted = []
    for e in error:
        places = [r for r, other in enumerate(sorted(error, reverse=True), start=1) if other == e]
        rank = sum(places) / len(places)
        share = (size - rank) / (size - 1) if size > 1 else 1.0
        wanted.append(1 + alpha * share if max(error) else 1.0)
    close(decide("rank", situation(error), alpha=alpha), wanted)


@exact
@given(errors, alphas)
def test_inverse_and_proportional(error: list[float], alpha: float) -> None:
    top = max(error)
    wanted = [1 + alpha * (1 - e / top) if top else 1.0 for e in error]
    close(decide("inverse", situation(error), alpha=alpha), wanted)
    close(decide("proportional", situation(error)), [e / top if top else 1.0 for e in error])


def chosen(size: int, heads: int, top: float) -> int:
    return max(1, math.ceil(top * (size - heads) - 1e-9)) if size > heads else 0


@exact
@given(errors, shares, floors, st.integers(0, 2), st.sampled_from(["top", "bottom"]))
def test_top_and_bottom(
    error: list[float], top: float, floor: float, heads: int, policy: str
) -> None:
    heads = min(heads, len(error))
    size = len(error)
    sign = -1 if policy == "top" else 1
    order = sorted(range(size - heads), key=lambda k: (sign * error[k], k))
    best = set(order[: chosen(size, heads, top)])
    wanted = [1.0 if k in best or k >= size - heads else floor for k in range(size)]
    if not max(error):
        wanted = [1.0] * size
    found = decide(policy, situation(error, heads=heads), top=top, floor=floor)
    assert found == wanted


@exact
@given(st.integers(1, 12), shares, floors, st.integers(0, 2))
def test_suffix(size: int, top: float, floor: float, heads: int) -> None:
    heads = min(heads, size)
    where = situation([0.0] * size, heads=heads)
    order = sorted(range(size - heads), key=lambda k: (-where.components[k].depth, k))
    best = set(order[: chosen(size, heads, top)])
    wanted = [1.0 if k in best or k >= size - heads else floor for k in range(size)]
    assert decide("suffix", where, top=top, floor=floor) == wanted


@exact
@given(st.integers(1, 12), shares, st.integers(0, 2), st.integers(0, 2**31))
def test_random_has_the_count_of_top_and_hangs_on_the_generator(
    size: int, top: float, heads: int, seed: int
) -> None:
    heads = min(heads, size)
    first, second = (
        decide("random", situation([1.0] * size, seed=seed, heads=heads), top=top) for _ in range(2)
    )
    assert first == second
    assert sum(first) == chosen(size, heads, top) + heads
    assert all(first[size - heads :])


def test_random_draws_every_component_equally_often() -> None:
    where = situation([1.0] * 6)
    config = Config(policy="random", top=0.5)
    drawn = sum(find_policy(config).lr_scale(where) for _ in range(2000))
    assert isinstance(drawn, Tensor)
    assert drawn.sum() == 6000
    assert ((drawn - 1000).abs() < 4.5 * math.sqrt(500)).all()


@exact
@given(st.integers(1, 12), st.floats(0.1, 1.0))
def test_layerwise_decay(size: int, decay: float) -> None:
    depths = [k // 2 for k in range(size)]
    wanted = [decay ** (max(depths) - d) for d in depths]
    close(decide("layerwise-decay", situation([0.0] * size), decay=decay), wanted)


@exact
@given(st.integers(1, 12), st.integers(0, 100), st.floats(0.05, 1.0), st.integers(0, 2))
def test_gradual_unfreezing(size: int, step: int, share: float, heads: int) -> None:
    where = situation([0.0] * size, step=step, heads=min(heads, size))
    depths = sorted({c.depth for c in where.components})
    opened = 1 + math.floor(step / (share * 100) * len(depths))
    allowed = set(depths[-opened:]) if opened < len(depths) else set(depths)
    wanted = [float(c.depth in allowed or c.kind == "head") for c in where.components]
    found = decide("gradual-unfreezing", where, unfrozen_by=share)
    assert found == wanted
    assert step < share * 100 or all(found)


def test_head_only_and_uniform() -> None:
    where = situation([3.0, 2.0, 1.0, 0.0], heads=1)
    assert decide("head-only", where) == [0, 0, 0, 1]
    assert decide("uniform", where) == [1, 1, 1, 1]


KINDS = {"drop-backward": "feed_forward"}


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("error", [[0.0] * 5, [1.0] * 5, [5.0, 4.0, 3.0, 2.0, 1.0], [7.0]])
def test_every_policy_is_pure_and_gives_allowed_multipliers(
    policy: str, error: list[float]
) -> None:
    kind = KINDS.get(policy, "layer")
    where = situation(error, heads=1, kind=kind)
    before = where.error.clone()
    first = decide(policy, where)
    assert first == decide(policy, situation(error, heads=1, kind=kind))
    assert torch.equal(where.error, before)
    assert all(0 <= scale < math.inf for scale in first)
    assert any(first)


@exact
@given(st.lists(st.sampled_from([0.0]) | st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_mean_one(scale: list[float]) -> None:
    found = mean_one(torch.tensor(scale, dtype=torch.float64)).tolist()
    trained = [s for s in scale if s > 0]
    mean = math.fsum(trained) / len(trained) if trained else 1.0
    close(found, [s / mean for s in scale])


@exact
@given(st.data(), st.integers(1, 8), st.integers(0, 5))
def test_hold(data: st.DataObject, size: int, min_stay: int) -> None:
    def draw(values: list[Any]) -> list[Any]:
        return data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))

    proposed, previous = draw([0.0, 0.5, 2.0]), draw([0.0, 1.0])
    stayed = draw([0, 1, 3, 9])
    wanted = [
        old if bool(new) != bool(old) and age < min_stay else new
        for new, old, age in zip(proposed, previous, stayed, strict=True)
    ]
    tensors = (torch.tensor(proposed), torch.tensor(previous), torch.tensor(stayed))
    assert hold(*tensors, min_stay).tolist() == wanted


def test_refusals() -> None:
    with pytest.raises(InputError, match="unknown policy 'nonsense'; allowed: normalized-max"):
        find_policy(Config(policy="nonsense"))
    with pytest.raises(InputError, match="total_steps"):
        find_policy(Config(policy="gradual-unfreezing"))


def test_what_must_stay_frozen_does_not_compete() -> None:
    where = replace(
        situation([9.0, 3.0, 2.0, 1.0]), never=torch.tensor([True, False, False, False])
    )
    assert decide("top", where, top=0.3) == [0.0, 1.0, 0.0, 0.0]
    costs = ComponentCosts(4, 0.25, {1 << k: 0.25 for k in range(4)})
    assert decide("purchase", replace(where, costs=costs), rate=0.75) == [0.0, 1.0, 1.0, 0.0]


def test_the_rate_moves_with_the_budget() -> None:
    costs = ComponentCosts(4, 0.2, {1 << k: 0.2 for k in range(4)})
    where = replace(situation([4.0, 3.0, 2.0, 1.0]), costs=costs)
    for start, end in ((1.0, 0.4), (0.4, 1.0)):
        for progress, bought in ((0.0, start), (1 / 3, None), (2 / 3, None), (1.0, end)):
            rate = start + progress * (end - start) if bought is None else bought
            found = decide("purchase", replace(where, progress=progress), rate=start, rate_end=end)
            assert sum(found) == round((rate - 0.2) / 0.2)
    fixed = decide("purchase", replace(where, progress=1.0), rate=0.6)
    assert sum(fixed) == 2
