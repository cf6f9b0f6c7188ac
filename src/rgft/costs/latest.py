"""What a step like the last one costs, by component."""

from __future__ import annotations

from collections.abc import Sequence

from rgft.components import Component
from rgft.costs.by_component import ComponentCosts, component_costs
from rgft.costs.conditions import Gates
from rgft.costs.graph import Graph
from rgft.costs.meter import FlopMeter


class LatestCosts:
    """Costs of a step like the last by component, relative to one in which all train.

    Args:
        meter: Saw the last step.
    """

    def __init__(self, meter: FlopMeter) -> None:
        self._meter = meter
        self._known: tuple[Graph, Gates | None, ComponentCosts] | None = None

    def of(
        self, components: Sequence[Component], gates: Gates | None = None
    ) -> ComponentCosts | None:
        """The costs; None before the first step.

        Args:
            components: All that can be trained.
            gates: Where branches are bypassed; see `component_costs`.
        """
        graph = self._meter.graph
        if graph is None:
            return None
        if self._known is None or self._known[0] is not graph or self._known[1] != gates:
            costs = component_costs([graph], components, gates=gates).relative()
            self._known = graph, gates, costs
        return self._known[2]
