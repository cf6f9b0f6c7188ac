"""Policies of others that draw, or freeze from the input up, against their formulas."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgft import Component, Config, InputError, Situation
from rgft.policies import find_policy
from test_policies import decide, exact, situation

DRAWS = 4000


def of_kinds(*kinds: str, error: list[float] | None = None, seed: int = 0) -> Situation:
    """One component a kind, at depths 0, 1, 2, ...; heads always train."""
    where = situation(error or [1.0] * len(kinds), seed=seed)
    parts = tuple(Component(f"c{i}", kind, i, (), 10) for i, kind in enumerate(kinds))
    return replace(where, components=parts, always=torch.tensor([k == "head" for k in kinds]))


MODEL = ("embedding", *["layer"] * 5, "norm", "head")


def draws(policy: str, where: Situation, **settings: float) -> Counter[tuple[int, ...]]:
    """How often each set of components trains."""
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        scale = decide(policy, where, **settings)
        found[tuple(i for i, s in enumerate(scale) if s)] += 1
    return found


def near(count: float, p: float) -> bool:
    """Within five standard deviations of a binomial."""
    return abs(count - DRAWS * p) <= 5 * math.sqrt(DRAWS * p * (1 - p)) + 1


def test_lisa_trains_all_but_layers_and_draws_these_alike() -> None:
    found = draws("lisa", of_kinds(*MODEL), active=2)
    assert len(found) == 10  # pairs of five
    assert all(near(count, 0.1) for count in found.values())
    assert all({0, 6, 7} < set(chosen) and len(chosen) == 5 for chosen in found)
    assert decide("lisa", of_kinds(*MODEL), active=9) == [1.0] * 8


def cycle(number: int, seed: int = 0) -> tuple[int, ...]:
    """Which layers train one after the other."""
    where = of_kinds(*MODEL, seed=seed)
    found = []
    for place in range(5):
        scale = decide("badam", replace(where, decision=5 * number + place))
        (layer,) = (i for i, s in enumerate(scale[:-1]) if s)
        assert scale[-1] == 1.0
        found.append(layer)
    return tuple(found)


def test_badam_trains_each_layer_once_a_cycle_in_an_order_drawn_anew() -> None:
    cycles = [cycle(number) for number in range(600)]
    assert all(sorted(order) == [1, 2, 3, 4, 5] for order in cycles)
    assert cycles == [cycle(number) for number in range(600)]
    found = Counter((place, layer) for order in cycles for place, layer in enumerate(order))
    assert len(found) == 25
    assert all(abs(n - 120) < 5 * math.sqrt(600 * 0.2 * 0.8) for n in found.values())
    assert len(set(cycles)) > 100  # of 120
    others = [cycle(number, seed=1) for number in range(600)]
    assert sum(a == b for a, b in zip(cycles[1:], others, strict=False)) < 30  # not one shifted


def test_badam_leaves_out_layers_that_may_not_train() -> None:
    where = replace(of_kinds(*MODEL), never=torch.arange(8) < 4)
    turns = [decide("badam", replace(where, decision=n)) for n in range(4)]
    for pair in (turns[:2], turns[2:]):
        assert sorted(scale.index(1.0) for scale in pair) == [4, 5]


def test_grass_draws_by_a_softmax_of_gradient_norms() -> None:
    error = [9.0, 1.0, 2.0, 4.0, 0.5, 3.0, 9.0, 9.0]
    temperature = 0.3
    weight = {i: math.exp(error[i] / 4.0 / temperature) for i in range(1, 6)}
    total = sum(weight.values())
    wanted: Counter[tuple[int, ...]] = Counter()
    for first, second in permutations(range(1, 6), 2):
        p = weight[first] / total * weight[second] / (total - weight[first])
        wanted[0, *sorted((first, second)), 6, 7] += p  # type: ignore[assignment]
    found = draws("grass", of_kinds(*MODEL, error=error), active=2, temperature=temperature)
    assert found.keys() <= wanted.keys()
    assert all(near(found[chosen], p) for chosen, p in wanted.items())


def test_grass_is_lisa_at_a_high_temperature() -> None:
    found = draws("grass", of_kinds(*MODEL, error=[float(i) for i in range(8)]), temperature=1e6)
    assert all(near(count, 0.1) for count in found.values())


@pytest.mark.parametrize("policy", ["lisa", "badam", "grass"])
def test_layers_that_are_not_there_are_not_drawn(policy: str) -> None:
    with pytest.raises(InputError, match="this policy draws layers, and there are none"):
        decide(policy, of_kinds("parameter", "parameter", "head"))


def test_misa_fills_a_share_of_the_parameters() -> None:
    sizes = [500, 10, 20, 40, 10, 20, 5]
    where = of_kinds("custom", *["custom"] * 5, "head", error=[9.0, 1.0, 0.0, 2.0, 1.0, 3.0, 0.0])
    parts = zip(where.components, sizes, strict=True)
    where = replace(where, components=tuple(replace(c, numel=n) for c, n in parts))
    found = draws("misa", where, parameter_share=0.3, temperature=0.5)
    assert all(6 in chosen and 0 not in chosen for chosen in found)
    for chosen in found:  # of the hundred below the head and above the input
        held = sum(sizes[i] for i in chosen if i != 6)
        left = [sizes[i] for i in range(1, 6) if i not in chosen]
        assert held <= 30 < held + min(left)
    weight = [math.exp(e / 3.0 / 0.5) for e in (1.0, 0.0, 2.0, 1.0, 3.0)]
    # alone, with the third too large: which of the others is first says most of it
    first = draws("misa", where, parameter_share=0.2, temperature=0.5)
    with_last = sum(count for chosen, count in first.items() if 5 in chosen)
    others = [w for i, w in enumerate(weight) if i != 2]
    assert near(with_last, others[3] / sum(others))  # it fills the share by itself
    with pytest.raises(InputError, match="less than that of the smallest component"):
        decide("misa", where, parameter_share=0.05)


@exact
@given(
    st.lists(st.tuples(st.floats(0.1, 9.0), st.floats(0.1, 9.0)), min_size=1, max_size=8),
    st.integers(0, 7),
)
def test_autofreeze(norms: list[tuple[float, float]], frozen: int) -> None:
    frozen = min(frozen, len(norms) - 1)
    before, now = ([*side, 1.0] for side in zip(*norms, strict=True))
    where = of_kinds(*["layer"] * len(norms), "head", error=now)
    where = replace(
        where,
        previous_error=torch.tensor(before, dtype=torch.float64),
        trained=torch.arange(len(now)) >= frozen,
    )
    change = [abs(b - n) / b for b, n in norms][frozen:]
    ranked = sorted(change)
    half = len(ranked) // 2
    median = ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2
    wanted = frozen
    while change and change[0] < median:
        change.pop(0)
        wanted += 1
    assert decide("autofreeze", where) == [float(i >= wanted) for i in range(len(now))]


def test_autofreeze_waits_for_two_looks() -> None:
    assert decide("autofreeze", of_kinds("layer", "layer", "head")) == [1.0, 1.0, 1.0]


def test_blocks_drop_out_by_themselves_and_take_their_norms_along() -> None:
    kinds = ("embedding", "attention", "feed_forward", "norm", "attention", "feed_forward", "norm")
    where = of_kinds(*kinds, "head")
    depths = (0, 1, 1, 1, 2, 2, 2, 3)
    parts = zip(where.components, depths, strict=True)
    where = replace(where, components=tuple(replace(c, depth=d) for c, d in parts))
    found = draws("drop-backward", where, drop=0.3)
    assert len(found) == 16
    for chosen, count in found.items():
        blocks = [i for i in (1, 2, 4, 5) if i in chosen]
        assert near(count, 0.7 ** len(blocks) * 0.3 ** (4 - len(blocks)))
        assert {0, 7} <= set(chosen)
        assert (3 in chosen) == ({1, 2} <= set(chosen))
        assert (6 in chosen) == ({4, 5} <= set(chosen))
    with pytest.raises(InputError, match="no attention or feed-forward blocks"):
        decide("drop-backward", of_kinds("layer", "head"))


def test_settings_of_draws() -> None:
    for name, value in (("active", 0), ("temperature", 0.0), ("drop", 1.0)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            Config(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="active has no effect"):
        find_policy(Config(policy="misa", active=3))
    with pytest.raises(InputError, match="top has no effect on the policy 'misa'"):
        find_policy(Config(policy="misa", top=0.03))
    with pytest.raises(InputError, match="parameter_share has no effect on the policy 'top'"):
        find_policy(Config(policy="top", parameter_share=0.3))
