"""The cost of a step as a function of which components train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rgft.components import Component
from rgft.costs.graph import Graph


@dataclass(frozen=True, slots=True)
class ComponentCosts:
    r"""FLOPs of a step for any set S of trained components.

    .. math:: c(S) = c_{forward} + \sum_{M : M \cap S \ne \emptyset} c_M

    where :math:`c_M` is the work that every component of M needs when it trains: the weight
    gradients of a component are its own (or shared with others that hold slices of the same
    parameters), the input gradients of a layer belong to all components below it.

    Attributes:
        components: How many there are.
        forward: FLOPs of the forward pass.
        backward: FLOPs :math:`c_M` by M, a set of component indices as bits of a number.
    """

    components: int
    forward: float
    backward: Mapping[int, float]

    def cost(self, trained: Collection[int]) -> float:
        """FLOPs of a step in which the components with these indices train.

        >>> ComponentCosts(2, 10.0, {0b01: 3.0, 0b11: 4.0}).cost([1])
        14.0
        """
        bits = sum(1 << index for index in set(trained))
        return self.forward + sum(flops for owners, flops in self.backward.items() if owners & bits)

    @property
    def full(self) -> float:
        """FLOPs of a step in which all train."""
        return self.cost(range(self.components))

    def relative(self) -> ComponentCosts:
        """The same in units of a step in which all train."""
        unit = self.full
        backward = {owners: flops / unit for owners, flops in self.backward.items()}
        return ComponentCosts(self.components, self.forward / unit, backward)


def component_costs(
    graphs: Iterable[Graph],
    components: Sequence[Component],
    *,
    detached: Collection[str] = (),
    skipped: Collection[str] = (),
) -> ComponentCosts:
    """Costs by component, summed over `graphs` (one for each batch shape that stands for many)."""
    owners: dict[str, int] = {}
    for index, component in enumerate(components):
        for part in component.slices:
            owners[part.parameter] = owners.get(part.parameter, 0) | 1 << index
    forward, backward = 0, dict[int, float]()
    for graph in graphs:
        forward += graph.cost((), skipped=skipped).forward
        found = graph.gradients(owners, detached=detached, skipped=skipped)
        for bits, flops in found.items():
            backward[bits] = backward.get(bits, 0.0) + flops
    return ComponentCosts(len(components), float(forward), backward)
