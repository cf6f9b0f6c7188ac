"""What a policy sees, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgft.components import Component
from rgft.costs import ComponentCosts


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a policy may look at when it decides.

    Attributes:
        error: The error map E, float64 `[K]`, on the host.
        components: The K components, in the order of the map.
        always: Components that must not be frozen (new task heads), bool `[K]`.
        never: Components that stay frozen (below `Config.frozen_below`), bool `[K]`.
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the whole run, where known.
        generator: Source of randomness; part of the checkpoint.
        trained: Components that the plan in force trains, bool `[K]`.
        decision: How many decisions came before this one.
        previous_error: The map as it stood at the decision before this one, `[K]`; None at the
            first.
        costs: Costs of a step by component, relative to a full one, where spending is counted.
        progress: Share of the budget that is spent (of its present stage, if it has stages), in
            [0, 1], where spending is counted.
    """

    error: Tensor
    components: tuple[Component, ...]
    always: Tensor
    never: Tensor
    step: int
    total_steps: int | None
    generator: torch.Generator
    trained: Tensor
    decision: int = 0
    previous_error: Tensor | None = None
    costs: ComponentCosts | None = None
    progress: float | None = None

    @property
    def depth(self) -> Tensor:
        """Depth of each component, float64 `[K]`."""
        return torch.tensor([c.depth for c in self.components], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Policy:
    """A pure rule from a situation to learning-rate multipliers.

    Attributes:
        lr_scale: Multiplier of each component, `[K]`, >= 0; 0 freezes.
        uses_error: Whether it looks at the error map. If it does, frozen components are probed.
        changes: Whether it can decide differently later; if not, it is asked once.
        freezes: Whether it is known to freeze, so that settings which forbid it are refused early.
        uses_costs: Whether it looks at what steps cost.
        restarts: Whether the optimizer forgets its state at each decision, but for that of
            components that always train.
        turns: Whether layers take turns, one at each decision, so that a short run misses some.
    """

    lr_scale: Callable[[Situation], Tensor]
    uses_error: bool = True
    changes: bool = True
    freezes: bool = False
    uses_costs: bool = False
    restarts: bool = False
    turns: bool = False
