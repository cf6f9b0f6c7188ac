"""The cost of a step as a function of which components train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rgft.components import Component
from rgft.costs.conditions import ALWAYS, Condition, Gates, conditional_gradients
from rgft.costs.graph import Graph


@dataclass(frozen=True, slots=True)
class ComponentCosts:
    r"""FLOPs of a step for any set S of trained components.

    .. math:: c(S) = c_{forward} + \sum_{M : M \cap S \ne \emptyset} c_M + \sum_{A : A(S)} c_A

    where :math:`c_M` is the work that every component of M needs when it trains: the weight
    gradients of a component are its own (or shared with others that hold slices of the same
    parameters), the input gradients of a layer belong to all components below it. With bypasses
    an input gradient is computed only if the layer itself trains as well: :math:`c_A` is spent
    under such a condition A.

    Attributes:
        components: How many there are.
        forward: FLOPs of the forward pass.
        backward: FLOPs :math:`c_M` by M, a set of component indices as bits of a number.
        jointly: FLOPs :math:`c_A` by A, where it takes several components together.
    """

    components: int
    forward: float
    backward: Mapping[int, float]
    jointly: Mapping[Condition, float] = field(default_factory=dict)

    def cost(self, trained: Collection[int]) -> float:
        """FLOPs of a step in which the components with these indices train.

        >>> ComponentCosts(2, 10.0, {0b01: 3.0, 0b11: 4.0}).cost([1])
        14.0
        """
        bits = _bits(trained)
        return (
            self.forward
            + sum(flops for owners, flops in self.backward.items() if owners & bits)
            + sum(flops for condition, flops in self.jointly.items() if condition.holds(bits))
        )

    @property
    def full(self) -> float:
        """FLOPs of a step in which all train."""
        return self.cost(range(self.components))

    def relative(self) -> ComponentCosts:
        """The same in units of a step in which all train."""
        unit = self.full
        backward = {owners: flops / unit for owners, flops in self.backward.items()}
        jointly = {condition: flops / unit for condition, flops in self.jointly.items()}
        return ComponentCosts(self.components, self.forward / unit, backward, jointly)

    def given(self, trained: Collection[int], frozen: Collection[int]) -> ComponentCosts:
        """The same costs once it is known that some components train, and others do not.

        What is left to be decided is in fewer terms; those that are sure are in `forward`.
        """
        on, off = _bits(trained), _bits(frozen)
        forward, backward, jointly = self.forward, dict[int, float](), dict[Condition, float]()
        terms = [(Condition(owners), flops) for owners, flops in self.backward.items()]
        for condition, flops in [*terms, *self.jointly.items()]:
            rest = condition.given(on, off)
            if rest == ALWAYS:
                forward += flops
            elif rest.together:
                jointly[rest] = jointly.get(rest, 0.0) + flops
            elif rest.alone:
                backward[rest.alone] = backward.get(rest.alone, 0.0) + flops
        return ComponentCosts(self.components, forward, backward, jointly)


def component_costs(
    graphs: Iterable[Graph],
    components: Sequence[Component],
    *,
    gates: Gates | None = None,
    skipped: Collection[str] = (),
) -> ComponentCosts:
    """Costs by component, summed over `graphs` (one for each batch shape that stands for many).

    Args:
        graphs: What is run.
        components: Those that train or do not.
        gates: For modules that end bypassed branches, who opens them; see
            `rgft.costs.conditions.conditional_gradients`.
        skipped: Paths of modules that are not run.
    """
    owners: dict[str, int] = {}
    for index, component in enumerate(components):
        for part in component.slices:
            owners[part.parameter] = owners.get(part.parameter, 0) | 1 << index
    forward, backward, jointly = 0, dict[int, float](), dict[Condition, float]()
    for graph in graphs:
        forward += graph.cost((), skipped=skipped).forward
        for condition, flops in conditional_gradients(graph, owners, gates or {}, skipped).items():
            if condition.together:
                jointly[condition] = jointly.get(condition, 0.0) + flops
            else:
                backward[condition.alone] = backward.get(condition.alone, 0.0) + flops
    return ComponentCosts(len(components), float(forward), backward, jointly)


def _bits(indices: Collection[int]) -> int:
    return sum(1 << index for index in set(indices))
