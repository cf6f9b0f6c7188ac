"""A budget: how much compute a run may spend, how far it has come, and when it ends."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgft.components import Component
from rgft.costs import ComponentCosts, FlopMeter, component_costs
from rgft.costs.graph import Graph
from rgft.errors import InputError

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
ALLOWED = "a share of full fine-tuning in (0, 1], such as 0.3, or a time, such as 90s, 20min or 2h"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend: one of the two.

    Attributes:
        share: Of the FLOPs of full fine-tuning on the same data and epochs, in (0, 1].
        seconds: On the wall, from when spending begins; evaluations during training count.
    """

    share: float | None = None
    seconds: float | None = None


def parse_budget(text: str) -> Budget:
    """The budget that a text names.

    Raises:
        InputError: It names none.

    >>> parse_budget("0.3"), parse_budget("20min")
    (Budget(share=0.3, seconds=None), Budget(share=None, seconds=1200.0))
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(s|min|h)?\s*", text)
    if match is None:
        raise InputError(f"budget is {text!r}; allowed: {ALLOWED}")
    number, unit = float(match[1]), match[2]
    if number <= 0 or (unit is None and number > 1):
        raise InputError(f"budget is {text!r}; allowed: {ALLOWED}")
    return Budget(seconds=number * SECONDS[unit]) if unit else Budget(share=number)


class Spending:
    r"""What has been spent of a budget. It paces the learning rate and says when the run ends.

    The learning-rate schedule is a function of the share of the *budget* that is spent, not of
    steps: a plan whose steps are cheap gets more of them. The run ends with the step after which
    spending is nearest to the budget.

    Args:
        meter: Counts the FLOPs of the model that trains.
        budget: What may be spent.
        full: FLOPs of full fine-tuning on the same data and epochs, where they are known.
        batches: Forward passes of full fine-tuning, where `full` is not known: it is then their
            number times the mean cost of those seen so far.
        clock: Seconds, for a budget of time.

    Attributes:
        seconds: Time spent in earlier parts of a run that is resumed.

    Raises:
        InputError: A share of something unknown.

    >>> from torch import nn, ones
    >>> model = nn.Linear(2, 1)
    >>> spending = Spending(FlopMeter(model), Budget(share=0.5), batches=4)
    >>> while not spending.finished:
    ...     _ = model(ones(1, 2)); spending.step()
    >>> spending.progress
    1.0
    """

    def __init__(
        self,
        meter: FlopMeter,
        budget: Budget,
        *,
        full: int | None = None,
        batches: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if budget.share is not None and full is None and batches is None:
            raise InputError("a share of full fine-tuning needs its cost: give full= or batches=")
        self.meter, self.budget = meter, budget
        self.seconds = 0.0
        self._full, self._batches, self._clock = full, batches, clock
        self._started = clock()
        self._before = self._last = 0.0
        self._costs: tuple[Graph, ComponentCosts] | None = None

    @property
    def full(self) -> float:
        """FLOPs of full fine-tuning: known, or estimated from the batches so far."""
        if self._full is not None:
            return float(self._full)
        assert self._batches is not None
        return self.meter.full / max(self.meter.batches, 1) * self._batches

    @property
    def spent(self) -> float:
        """FLOPs, or seconds, so far."""
        if self.budget.seconds is not None:
            return self.seconds + self._clock() - self._started
        return float(self.meter.spent)

    @property
    def limit(self) -> float:
        """FLOPs, or seconds, that may be spent."""
        if self.budget.seconds is not None:
            return self.budget.seconds
        assert self.budget.share is not None
        return self.budget.share * self.full

    @property
    def flops_limit(self) -> float:
        """FLOPs that may be spent; those of full fine-tuning where the limit is a time."""
        return self.full * (self.budget.share if self.budget.share is not None else 1.0)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        limit = self.limit
        return min(1.0, self.spent / limit) if limit else 0.0

    @property
    def finished(self) -> bool:
        """Whether another step like the last would end further from the budget than this one."""
        return bool(self.limit) and self.spent + self._last / 2 >= self.limit

    def step(self) -> None:
        """Note that an optimizer step has ended."""
        spent = self.spent
        self._last, self._before = spent - self._before, spent

    def paced(self, schedule: Callable[[int], float], steps: int) -> Callable[[int], float]:
        """A schedule over `steps` steps as one over the budget, whatever step it is asked for."""
        return lambda step: schedule(min(steps, round(self.progress * steps)))

    def costs(self, components: Sequence[Component]) -> ComponentCosts | None:
        """Costs of a step like the last by component, relative to a full one; None before it."""
        graph = self.meter.graph
        if graph is None:
            return None
        if self._costs is None or self._costs[0] is not graph:
            self._costs = graph, component_costs([graph], components).relative()
        return self._costs[1]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "spent": self.meter.spent,
            "full": self.meter.full,
            "batches": self.meter.batches,
            "seconds": self.seconds + self._clock() - self._started,
            "last": [self._before, self._last],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.meter.spent, self.meter.full = int(state["spent"]), int(state["full"])
        self.meter.batches = int(state["batches"])
        self.seconds, self._started = float(state["seconds"]), self._clock()
        self._before, self._last = (float(x) for x in state["last"])
