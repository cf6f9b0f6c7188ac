"""The chosen components against all sets of components."""

from __future__ import annotations

import random
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import BATCHES, FAMILIES
from rgft import CostModel, partition
from rgft.costs import ComponentCosts, component_costs
from rgft.costs.conditions import Condition, both, either
from rgft.policies import purchase as module
from rgft.policies.purchase import purchase


def by_brute_force(
    values: list[float], costs: ComponentCosts, allowance: float, always: set[int]
) -> float:
    """The most value of any affordable set."""
    free = [i for i in range(costs.components) if i not in always]
    best = 0.0
    for size in range(len(free) + 1):
        for chosen in combinations(free, size):
            if costs.cost({*chosen, *always}) <= allowance * (1 + 1e-12):
                best = max(best, sum(values[i] for i in chosen))
    return best


def check(values: list[float], costs: ComponentCosts, allowance: float, always: set[int]) -> None:
    chosen = purchase(values, costs, allowance, always)
    assert always <= chosen
    gained = sum(values[i] for i in chosen - always)
    assert gained == pytest.approx(by_brute_force(values, costs, allowance, always), rel=1e-9)
    assert chosen == always or costs.cost(chosen) <= allowance * (1 + 1e-9)


def singles(bits: int) -> list[int]:
    return [1 << i for i in range(bits.bit_length()) if bits >> i & 1]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], ComponentCosts, float, set[int]]:
    """Any shared work at all, not only that of chains."""
    count = draw(st.integers(1, 9))
    amount = st.one_of(st.integers(0, 9).map(float), st.floats(0, 10))
    values = draw(st.lists(amount, min_size=count, max_size=count))
    backward = draw(st.dictionaries(st.integers(1, 2**count - 1), amount, max_size=12))
    several = st.sets(st.integers(1, 2**count - 1), min_size=1, max_size=4)
    jointly: dict[Condition, float] = {}
    for sets in draw(st.lists(several, max_size=4)):
        condition = reduce(either, (reduce(both, map(Condition, singles(s))) for s in sets))
        jointly[condition] = jointly.get(condition, 0.0) + draw(amount)
    costs = ComponentCosts(count, draw(amount), backward, jointly)
    allowance = draw(st.floats(0, 1)) * costs.full * (1 + 1e-6)
    return values, costs, allowance, draw(st.sets(st.integers(0, count - 1), max_size=2))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_any_problem(problem: tuple[list[float], ComponentCosts, float, set[int]]) -> None:
    check(*problem)


def test_what_costs_next_to_nothing() -> None:
    tiny = 2.225073858507e-311
    check([1.0, 2.0], ComponentCosts(2, 0.0, {1: tiny, 2: 1.0}), 0.5, set())
    check([1.0], ComponentCosts(1, 0.0, {1: tiny}), tiny, set())


def chain(count: int, draw: random.Random) -> ComponentCosts:
    """Layers in a row: each has weight gradients, and all below need its input gradient."""
    backward = {1 << i: draw.choice([4.0, 8.0, draw.random() * 8]) for i in range(count)}
    for i in range(1, count):
        below = (1 << i) - 1
        backward[below] = backward.get(below, 0.0) + draw.choice([4.0, 8.0])
    return ComponentCosts(count, 8.0 * count, backward)


@pytest.mark.parametrize("seed", range(12))
def test_a_chain_of_fourteen(seed: int) -> None:
    draw = random.Random(seed)
    costs = chain(14, draw)
    values = [draw.choice([draw.random(), 1.0, 0.0]) for _ in range(14)]
    check(values, costs, draw.uniform(0.3, 1.0) * costs.full, {13})


@pytest.mark.parametrize("seed", range(8))
def test_a_long_chain(seed: int) -> None:
    """Against dynamic programming over whole weights, for each depth of the deepest."""
    draw, count = random.Random(seed), 150
    weights, passing = ([draw.randint(1, 40) for _ in range(count)] for _ in range(2))
    backward = {1 << i: float(weight) for i, weight in enumerate(weights)}
    for i in range(1, count):
        below = (1 << i) - 1
        backward[below] = backward.get(below, 0.0) + passing[i]
    values = [draw.choice([draw.random(), 1.0, 0.0, draw.random() ** 5]) for _ in range(count)]
    for allowance in (40, 500, 1500, 3000, 5000):
        left, best, most = allowance, 0.0, np.zeros(allowance + 1)
        for i in reversed(range(count)):  # most[w]: by weight w among components i and above
            weight = weights[i]
            most[weight:] = np.maximum(most[weight:], most[:-weight] + values[i])
            if left >= 0:
                best = max(best, most[left])
            left -= passing[i]
        costs = ComponentCosts(count, 10.0, backward)
        chosen = purchase(values, costs, allowance + 10.0)
        assert sum(values[i] for i in chosen) == pytest.approx(best, rel=1e-9)
        assert costs.cost(chosen) <= allowance + 10


def bypassed_chain(count: int, draw: random.Random) -> ComponentCosts:
    """Layers in a row: the input gradient of one is due if it trains, and one below it does."""
    jointly: dict[Condition, float] = {}
    for i in range(1, count - 1):
        condition = both(Condition(1 << i), Condition((1 << i) - 1))
        jointly[condition] = draw.choice([4.0, 8.0, draw.random() * 8])
    backward = {1 << i: draw.choice([4.0, 8.0, draw.random() * 8]) for i in range(count)}
    return ComponentCosts(count, 8.0 * count, backward, jointly)


@pytest.mark.parametrize("seed", range(12))
def test_a_bypassed_chain_of_thirteen(seed: int) -> None:
    draw = random.Random(seed)
    costs = bypassed_chain(13, draw)
    values = [draw.choice([draw.random(), 1.0, 0.0]) for _ in range(13)]
    check(values, costs, draw.uniform(0.3, 1.0) * costs.full, {12})


def test_a_long_bypassed_chain_takes_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two problems without joint work for each layer that may be the lowest."""
    draw = random.Random(0)
    costs = bypassed_chain(60, draw)
    looks = 0
    plain = module._best

    def counted(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return plain(*args)

    monkeypatch.setattr(module, "_best", counted)
    chosen = purchase([draw.random() for _ in range(60)], costs, 0.6 * costs.full, {59})
    assert len(chosen) > 10
    assert looks <= 2 * 60


def test_conditions_are_what_they_say() -> None:
    """Against truth tables; no set is kept that another implies."""
    draw = random.Random(3)
    for _ in range(300):
        sets = [[draw.randrange(1, 32) for _ in range(draw.randint(1, 3))] for _ in range(2)]
        left, right = (
            reduce(either, (reduce(both, map(Condition, singles(s))) for s in group))
            for group in sets
        )
        on, off = draw.randrange(32), draw.randrange(32)
        for trained in range(32):
            by_hand = [any(s & trained == s for s in group) for group in sets]
            assert [left.holds(trained), right.holds(trained)] == by_hand
            assert either(left, right).holds(trained) == any(by_hand)
            assert both(left, right).holds(trained) == all(by_hand)
            if trained & on == on and not trained & off:
                assert left.given(on, off).holds(trained) == by_hand[0]
        kept = [*singles(left.alone), *left.together]
        assert not any(a != b and a & b == a for a in kept for b in kept)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart", "resnet", "llama"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_real_models(family: str, granularity: str) -> None:
    if (family, granularity) == ("resnet", "block"):
        granularity = "layer"
    model = FAMILIES[family]()
    components = partition(model, granularity)
    costs = component_costs([CostModel(model).graph(**BATCHES[family]())], components)
    draw = random.Random(0)
    groups = components[:14]
    if len(components) > len(groups):  # brute force over the first, the others always train
        always = set(range(len(groups), len(components)))
    else:
        always = {len(components) - 1}
    for _ in range(3):
        values = [draw.random() for _ in components]
        check(values, costs, draw.uniform(0.4, 1.0) * costs.full, always)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "deberta_v2", "resnet"])
def test_costs_by_component_are_those_of_the_graph(family: str) -> None:
    model = FAMILIES[family]()
    graph = CostModel(model).graph(**BATCHES[family]())
    draw = random.Random(1)
    for granularity in ("layer", "parameter"):
        components = partition(model, granularity)
        costs = component_costs([graph, graph], components)
        for _ in range(20):
            chosen = draw.sample(range(len(components)), draw.randint(0, len(components)))
            names = {s.parameter for i in chosen for s in components[i].slices}
            assert costs.cost(chosen) == 2 * graph.cost(names).total
        assert costs.relative().full == pytest.approx(1)


def test_heads_share_the_work_of_their_parameters() -> None:
    model = FAMILIES["bert"]()
    graph = CostModel(model).graph(**BATCHES["bert"]())
    components = partition(model, "head")
    costs = component_costs([graph], components)
    heads = [i for i, c in enumerate(components) if c.kind == "attention_head"]
    first = [i for i in heads if components[i].depth == components[heads[0]].depth]
    assert len(first) > 1
    assert costs.cost(first) == costs.cost(first[:1])
