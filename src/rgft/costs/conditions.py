"""Who must train for a gradient to be computed, where branches are bypassed until someone does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rgft.costs.graph import Graph

Gates = Mapping[str, Sequence[int]]
REMEMBERED = 2**14  # operations of a layer repeat the same few


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds if one of `alone` trains, or all of one of the sets `together` do.

    Attributes:
        alone: Owners that suffice each, as bits of a number.
        together: Sets of owners, as bits; none contains another, or one of `alone`.
    """

    alone: int = 0
    together: frozenset[int] = frozenset()

    def holds(self, trained: int) -> bool:
        """Whether it does if the owners `trained` (as bits) train.

        >>> Condition(0b1, frozenset({0b110})).holds(0b010)
        False
        """
        return bool(self.alone & trained) or any(s & trained == s for s in self.together)

    def given(self, trained: int, frozen: int) -> Condition:
        """What is left of it once some owners are known to train, and others not to."""
        if self.alone & trained:
            return ALWAYS
        rest = (s & ~trained for s in self.together if not s & frozen)
        return _condition(self.alone & ~frozen, rest)

    def owners(self) -> int:
        """All that it speaks of."""
        found = self.alone
        for together in self.together:
            found |= together
        return found


NEVER = Condition()
ALWAYS = Condition(0, frozenset({0}))


@lru_cache(REMEMBERED)
def either(left: Condition, right: Condition) -> Condition:
    """Holds if one of the two does."""
    if left == right:
        return left
    return _condition(left.alone | right.alone, left.together | right.together)


@lru_cache(REMEMBERED)
def both(left: Condition, right: Condition) -> Condition:
    """Holds if the two do."""
    if ALWAYS in (left, right):
        return right if left == ALWAYS else left
    pairs = (a | b for a in _sets(left) for b in _sets(right))
    return _condition(0, pairs)


def conditional_gradients(
    graph: Graph, owners: Mapping[str, int], gates: Gates, skipped: Collection[str] = ()
) -> dict[Condition, int]:
    """FLOPs of the backward pass by who must train for them to be spent.

    Corrections are left out, since those who buy by these costs count on none being negative. So
    attention whose mask trains (T5's bias, without dropout) is up to a product of scores too dear.

    Args:
        graph: The operations of a forward pass.
        owners: For each parameter, the owners that train it, as bits of a number.
        gates: For modules that are detached, who opens them: the output of a module passes a
            gradient if of each of these sets (bits) someone trains.
        skipped: Paths of modules that are not run.
    """
    gate = _gates_of_values(graph, gates)
    unrun = graph.within(skipped)
    reach = _reach(graph, gate)
    wanted = {graph.parameters[n]: Condition(b) for n, b in owners.items() if n in graph.parameters}
    found: dict[Condition, int] = {}

    def spend(condition: Condition, flops: int) -> None:
        if flops and condition != NEVER:
            found[condition] = found.get(condition, 0) + flops

    for i, node in enumerate(graph.nodes):
        needed = NEVER if i in unrun else _any(wanted.get(v, NEVER) for v in node.inputs)
        if needed == NEVER:
            continue
        reached = _any(reach[v] for v in node.outputs if v in reach)
        for value in node.outputs:
            passed = both(needed, gate.get(value, ALWAYS))
            wanted[value] = either(wanted.get(value, NEVER), passed)
        spend(both(needed, reached), node.joint)
        for value, flops in node.gradients:
            spend(both(wanted.get(value, NEVER), reached), flops)
    return found


def _gates_of_values(graph: Graph, gates: Gates) -> dict[int, Condition]:
    """What must hold for a gradient to pass the values that detached modules return."""
    found: dict[int, Condition] = {}
    for path, openers in gates.items():
        for value in graph.modules[path].outputs:
            for bits in openers:
                found[value] = both(found.get(value, ALWAYS), Condition(bits))
    return found


def _reach(graph: Graph, gate: Mapping[int, Condition]) -> dict[int, Condition]:
    """What must hold for a path of gradients to lead from each value to the outputs."""
    reach = {value: gate.get(value, ALWAYS) for value in graph.outputs}
    for node in reversed(graph.nodes):
        reached = _any(reach[v] for v in node.outputs if v in reach)
        if reached != NEVER:
            for value in node.inputs:
                passed = both(reached, gate.get(value, ALWAYS))
                reach[value] = either(reach.get(value, NEVER), passed)
    return reach


def _any(conditions: Iterable[Condition]) -> Condition:
    found = NEVER
    for condition in conditions:
        found = either(found, condition)
    return found


def _sets(condition: Condition) -> list[int]:
    bits = condition.alone
    singles = [1 << i for i in range(bits.bit_length()) if bits >> i & 1]
    return [*singles, *condition.together]


def _condition(alone: int, together: Iterable[int]) -> Condition:
    """The same without what is implied: a set that contains another says nothing more."""
    sets = set(together)
    if 0 in sets:
        return ALWAYS
    for s in sets:
        alone |= s if s.bit_count() == 1 else 0
    least: list[int] = []
    for s in sorted((s for s in sets if not s & alone), key=int.bit_count):
        if not any(t & s == t for t in least):
            least.append(s)
    return Condition(alone, frozenset(least))
