r"""The set of components with the most score for a given cost, found exactly.

.. math:: \max_{S} \sum_{k \in S} v_k \quad \text{subject to} \quad c(S) \le C

with the cost :math:`c` of `rgft.costs.ComponentCosts`: what a component needs for itself alone is a
weight, as in a knapsack; what several need (input gradients above the deepest, the weight gradient
of a parameter that heads share) is paid once. For each union of such shared work that some set
needs, the rest is a knapsack problem; most unions are ruled out by their bound.

Where frozen branches are bypassed, some work is due only if several components train together. A
choice that is the best without that work, and can pay for it, is the best; else one component is
decided both ways, which leaves less of such work on each side (branch and bound). In a chain it is
the lowest: once it trains, the work of each layer above depends on that layer alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import or_

import numpy as np
from numpy.typing import NDArray

from rgft.costs import ComponentCosts

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
LIKELY = 32  # unions with the largest rough bounds
TOLERANCE = 1e-12  # of cost and value, relative: sums in another order differ by rounding


@dataclass(frozen=True, slots=True)
class _Goods:
    """What is still to be had, by falling value per weight.

    Attributes:
        index: Which component each is, `[n]`.
        values: Their scores, `[n]`.
        weights: What each costs for itself, `[n]`.
        shared: The shared work each needs, as bits of a number.
        prices: Cost of each piece of shared work.
    """

    index: Indices
    values: Array
    weights: Array
    shared: list[int]
    prices: list[float]


def purchase(
    values: Iterable[float], costs: ComponentCosts, allowance: float, always: Iterable[int] = ()
) -> frozenset[int]:
    """Indices of the components to train.

    Args:
        values: Score of each component, >= 0, `[K]`. Components with score 0 are never bought.
        costs: What sets of components cost.
        allowance: Most that the step may cost, in the unit of `costs`.
        always: Components that train whatever it costs.

    >>> costs = ComponentCosts(3, 6.0, {0b001: 3.0, 0b010: 2.0, 0b100: 1.0, 0b011: 3.0})
    >>> sorted(purchase([5.0, 4.5, 1.0], costs, 12.0))
    [1, 2]
    """
    bought = frozenset(always)
    worth = np.fromiter(values, dtype=np.float64)
    with np.errstate(all="ignore"):  # value per weight of what costs (next to) nothing
        return _searched(worth, costs, allowance, bought)


def _searched(
    values: Array, costs: ComponentCosts, allowance: float, always: frozenset[int]
) -> frozenset[int]:
    """Branch and bound over the components that other work depends on."""
    worthless = frozenset(np.flatnonzero(values <= 0).tolist()) - always
    best, most = always, 0.0
    waiting = [(always, worthless)]
    while waiting:
        on, off = waiting.pop()
        left = costs.given(on, off)
        if left.cost(()) > allowance * (1 + TOLERANCE):
            continue
        open_values = values.copy()
        open_values[list(on | off)] = 0.0
        easy = ComponentCosts(left.components, left.forward, left.backward)
        chosen = on | _best(open_values, easy, allowance, frozenset())
        value = float(values[list(chosen - always)].sum())
        if value <= most * (1 + TOLERANCE):
            continue
        if left.cost(chosen) <= allowance * (1 + TOLERANCE):
            best, most = chosen, value
            continue
        decided = _most_in_the_way(left)
        waiting += [(on, off | {decided}), (on | {decided}, off)]
    return best


def _most_in_the_way(costs: ComponentCosts) -> int:
    """The component that the most work waits for together with others; the first of equals."""
    count = np.zeros(costs.components, dtype=np.int64)
    for condition in costs.jointly:
        owners = condition.owners() & ~condition.alone
        count += [owners >> i & 1 for i in range(costs.components)]
    return int(count.argmax())


def _best(
    values: Array, costs: ComponentCosts, allowance: float, bought: frozenset[int]
) -> frozenset[int]:
    """`purchase` with the components in `bought`."""
    left = allowance - costs.cost(bought)
    goods = _to_be_had(values, costs, bought)
    if left < -TOLERANCE * abs(allowance) or not len(goods.index):
        return bought
    unions, prices = _unions(goods, left)
    capacity = np.maximum(left - prices, 0.0) * (1 + TOLERANCE)
    inside = _affordable(goods, unions)
    bounds = _bounds(goods, inside, capacity)
    best, chosen = 0.0, np.empty(0, dtype=np.int64)
    for u in np.argsort(-bounds, kind="stable"):
        if bounds[u] <= best * (1 + TOLERANCE):
            break
        items = np.flatnonzero(inside[u])
        found = _knapsack(goods.values[items], goods.weights[items], float(capacity[u]), best)
        if found is not None:
            best, chosen = found[0], items[found[1]]
    return bought | frozenset(goods.index[chosen].tolist())


def _to_be_had(values: Array, costs: ComponentCosts, bought: frozenset[int]) -> _Goods:
    paid = sum(1 << index for index in bought)
    unpaid = [(o, flops) for o, flops in costs.backward.items() if flops and not o & paid]
    weights = np.zeros(costs.components)
    for owners, flops in unpaid:
        if owners.bit_count() == 1:
            weights[owners.bit_length() - 1] += flops
    joint = [(owners, flops) for owners, flops in unpaid if owners.bit_count() > 1]
    owned = _as_bits([owners for owners, _ in joint], costs.components)
    needed = _as_numbers(np.ascontiguousarray(owned.T))
    wanted = np.array([i for i in np.flatnonzero(values > 0) if i not in bought], dtype=np.int64)
    wanted = wanted[np.argsort(-values[wanted] / weights[wanted], kind="stable")]
    shared = [needed[i] for i in wanted]
    return _Goods(wanted, values[wanted], weights[wanted], shared, [flops for _, flops in joint])


def _as_bits(numbers: list[int], width: int) -> NDArray[np.bool_]:
    """The bits of each number, lowest first, `[numbers, width]`."""
    size = (width + 7) // 8
    packed = np.frombuffer(b"".join(n.to_bytes(size, "little") for n in numbers), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(numbers), size), axis=1, bitorder="little")
    return bits[:, :width].astype(bool)


def _as_numbers(bits: NDArray[np.bool_]) -> list[int]:
    """The inverse of `_as_bits`."""
    packed = np.packbits(bits, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _unions(goods: _Goods, left: float) -> tuple[list[int], Array]:
    """Each union of shared work that some affordable set needs, and its price.

    A need that contains all before it (the next layer of a chain) swallows every union so far, so
    that later needs which contain it have only newer unions to be joined with.
    """
    found: dict[int, float] = {0: 0.0}
    newer, swallowed, so_far = [0], 0, 0
    needs = sorted(set(goods.shared), key=int.bit_count)
    alone = _prices(needs, goods.prices)
    for need in needs:
        whole = need & so_far == so_far
        bases = [0] if whole else newer if need & swallowed == swallowed else list(found)
        joined = {base | need for base in bases if base | need not in found}
        costs = {u: alone[u] for u in joined} if whole else _prices(joined, goods.prices)
        found |= {u: cost for u, cost in costs.items() if cost <= left * (1 + TOLERANCE)}
        so_far |= need
        if whole:
            newer, swallowed = [need], need
        else:
            newer += joined
    return list(found), np.array(list(found.values()))


def _prices(unions: Collection[int], prices: list[float]) -> dict[int, float]:
    """The price of each union."""
    costs = _as_bits(list(unions), len(prices)) @ np.array(prices)
    return dict(zip(unions, costs.tolist(), strict=True))


def _affordable(goods: _Goods, unions: list[int]) -> NDArray[np.bool_]:
    """Whether the shared work of each item is part of each union, `[unions, n]`.

    In a chain of layers the needs contain one another, so that a binary search settles it.
    """
    needs = sorted(set(goods.shared), key=int.bit_count)
    so_far = list(accumulate(needs, or_))
    place = {need: i for i, need in enumerate(needs)}
    places = np.array([place[need] for need in goods.shared])
    first = {joined: i for i, joined in enumerate(so_far, 1)}  # that many needs make up this union
    sure = [first.get(u) or bisect_left(so_far, True, key=partial(_exceeds, u)) for u in unions]
    inside: NDArray[np.bool_] = places < np.array(sure)[:, None]
    sizes = [need.bit_count() for need in needs]
    for row, union in enumerate(unions):
        for i in range(sure[row], bisect_right(sizes, union.bit_count())):
            if needs[i] & ~union == 0:
                inside[row] |= places == i
    return inside


def _exceeds(union: int, joined: int) -> bool:
    return joined & ~union != 0


def _bounds(goods: _Goods, inside: NDArray[np.bool_], capacity: Array) -> Array:
    """No less than what can be had within each union, `[unions]`.

    Those of unions that can be best are Dantzig's. At first the relaxed problem is solved with all
    items for each union, which takes one pass; what a few of the unions then yield rules out most.
    """
    values, weights = goods.values, goods.weights
    relaxed = np.interp(capacity, np.r_[0.0, weights.cumsum()], np.r_[0.0, values.cumsum()])
    bounds: Array = np.minimum(relaxed, inside @ values) * (1 + TOLERANCE)
    likely = np.argsort(-bounds, kind="stable")[:LIKELY]
    had, _ = _relaxed(inside[likely] * weights, inside[likely] * values, capacity[likely])
    rows = np.flatnonzero(bounds >= had.max())
    bounds[rows] = _relaxed(inside[rows] * weights, inside[rows] * values, capacity[rows])[1]
    return bounds


def _relaxed(weights: Array, values: Array, capacity: Array) -> tuple[Array, Array]:
    """In each row, items by falling value per weight: what fits in order, and Dantzig's bound."""
    end = weights.cumsum(1)
    fits = end <= capacity[:, None]
    whole: Array = (values * fits).sum(1)
    first = np.argmin(fits, axis=1)
    rows = np.arange(len(weights))
    weight = weights[rows, first]
    room = capacity - (end[rows, first] - weight)
    part = np.divide(room, weight, out=np.zeros_like(room), where=weight > 0)
    return whole, whole + np.where(fits.all(1), 0.0, part * values[rows, first])


def _knapsack(
    values: Array, weights: Array, capacity: float, best: float
) -> tuple[float, Indices] | None:
    """The most valuable items within `capacity`, if worth more than `best` (Pisinger 1997).

    Items come by falling value per weight. From the solution that takes items in order until one
    does not fit, the choice of items is reopened outwards from that one; of the pairs of weight
    and value so found the dominated ones, and those whose bound does not reach the best, go.
    Items that no solution better than the best can treat otherwise are not reopened at all.
    """
    end = weights.cumsum()
    split = int(np.searchsorted(end, capacity, side="right"))
    if split == len(values):
        return float(values.sum()), np.arange(len(values))
    value = np.array([values[:split].sum()])
    weight = np.array([weights[:split].sum()])
    found: tuple[int, int] | None = (0, 0) if value[0] > best else None
    best = max(best, float(value[0]))
    core = _core(values, weights, split, capacity - weight[0], best - value[0])
    taken, values, weights = np.arange(split), values[core], weights[core]
    flips: list[tuple[int, Indices, int]] = []
    split = int(np.searchsorted(core, split))
    low, high = split - 1, split
    while len(weight) and (low >= 0 or high < len(values)):
        adds = high < len(values) and (low < 0 or high - split <= split - 1 - low)
        item, sign = (high, 1.0) if adds else (low, -1.0)
        low, high = (low, high + 1) if adds else (low - 1, high)
        count = len(weight)
        weight = np.concatenate([weight, weight + sign * weights[item]])
        value = np.concatenate([value, value + sign * values[item]])
        keep = _worth_keeping(weight, value, capacity, best, _ratios(values, weights, low, high))
        weight, value = weight[keep], value[keep]
        flips.append((item, keep, count))
        fitting = np.where(weight <= capacity, value, -np.inf)
        if len(fitting) and fitting.max() > best:
            found = (len(flips), int(fitting.argmax()))
            best = float(fitting.max())
    if found is None:
        return None
    flipped = core[_flipped(flips, *found)]
    return best, np.setxor1d(taken, flipped, assume_unique=True)


def _core(values: Array, weights: Array, split: int, room: float, short: float) -> Indices:
    """The items whose flip does not cost so much that the best cannot be beaten (Dembo 1980).

    `short` is what the solution that takes the items before `split` lacks of the best.
    """
    ratio = values[split] / weights[split]
    gap = room * ratio - short
    slack = TOLERANCE * values.sum()
    core: Indices = np.flatnonzero(~(np.abs(values - ratio * weights) > gap + slack))
    return core


def _ratios(values: Array, weights: Array, low: int, high: int) -> tuple[float, float]:
    """Value per weight of the next item to add, and of the next to take out."""
    gain = values[high] / weights[high] if high < len(values) else 0.0
    loss = values[low] / weights[low] if low >= 0 and weights[low] > 0 else np.inf
    return float(gain), float(loss)


def _worth_keeping(
    weight: Array, value: Array, capacity: float, best: float, ratios: tuple[float, float]
) -> Indices:
    """Positions of the pairs that can still become better than `best`, dominated ones left out."""
    room = capacity - weight
    bound = value + np.where(room >= 0, room * ratios[0], room * ratios[1])
    keep = np.flatnonzero(bound > best * (1 + TOLERANCE))
    keep = keep[np.lexsort((-value[keep], weight[keep]))]
    before = np.maximum.accumulate(np.r_[-np.inf, value[keep]])[:-1]
    kept: Indices = keep[value[keep] > before]
    return kept


def _flipped(flips: list[tuple[int, Indices, int]], step: int, at: int) -> list[int]:
    """The items whose choice pair `at` after `step` flips has reversed."""
    items = []
    for item, keep, count in reversed(flips[:step]):
        origin = int(keep[at])
        if origin >= count:
            items.append(item)
        at = origin % count
    return items
