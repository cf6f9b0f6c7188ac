"""What training has cost so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from rgft.costs.graph import Graph
from rgft.costs.model import Action, CostModel
from rgft.processes import Processes
from rgft.structure.layers import without_replicas


class Counts(NamedTuple):
    """FLOPs so far, those of full fine-tuning on the same batches, and how many these are."""

    spent: int
    full: int
    batches: int


class FlopMeter:
    """Adds up the FLOPs of training as it runs, and what full fine-tuning would have cost.

    Every forward pass of `model` in training mode counts, with the backward pass that belongs to
    the parameters requiring a gradient at that moment. The optimizer and evaluation do not count.

    Args:
        model: The model that trains.
        reference: Costs of the model that full fine-tuning would train; by default `model` itself.
            With LoRA: the model before the pairs were added.

    Attributes:
        spent: FLOPs so far, of this process (see `totals`).
        full: FLOPs that full fine-tuning would have spent on the same batches.
        batches: How many those are.
        model: The model that trains.
        costs: Of the model.
        graph: Operations of the last of them.
        detached: Paths of modules whose output passes no gradient at present.
        skipped: Called at each forward pass: paths of modules that it does not run.
    """

    def __init__(self, model: nn.Module, reference: CostModel | None = None) -> None:
        model = without_replicas(model)
        self.costs = CostModel(model)
        self._reference = reference or self.costs
        self.model = model
        self.spent = 0
        self.full = 0
        self.batches = 0
        self.graph: Graph | None = None
        self.detached: frozenset[str] = frozenset()
        self.skipped: Callable[[], Collection[str]] = tuple
        self._probing = self._charging = self._alike = False
        self._processes: Processes | None = None
        self._settled = Counts(0, 0, 0)
        # a model that is compiled as a whole would compile the tracing with it
        disable: Callable[..., Any] = torch.compiler.disable
        self._handle = model.register_forward_pre_hook(disable(self._count), with_kwargs=True)

    @property
    def share(self) -> float:
        """Spent as a share of full fine-tuning; 0 before the first step."""
        return self.spent / self.full if self.full else 0.0

    @property
    def totals(self) -> Counts:
        """What all processes that train together have counted, as of the last `settle`."""
        own = Counts(self.spent, self.full, self.batches)
        return own if self._processes is None else self._settled

    def join(self, processes: Processes) -> None:
        """Others train along from now on. What all did alike so far counts once."""
        if self._processes is None:
            self._processes = processes
            self.load(Counts(self.spent, self.full, self.batches))

    def load(self, totals: Counts) -> None:
        """Go on from the counts of all processes, the same in each."""
        first = self._processes is None or self._processes.rank == 0
        self.spent, self.full, self.batches = totals if first else (0, 0, 0)
        self._settled = totals

    def settle(self) -> None:
        """Sum up what the processes have counted. Each of them has to."""
        if self._processes is not None:
            own = self.spent, self.full, self.batches
            self._settled = Counts(*self._processes.totals(own))

    @contextmanager
    def probing(self, *, alike: bool = False) -> Iterator[None]:
        """Forward passes in this block are spent, but full fine-tuning would not run them.

        Args:
            alike: Whether all processes run the same, which counts once.
        """
        self._probing, self._alike = True, alike
        try:
            yield
        finally:
            self._probing = self._alike = False

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Forward passes in this block are of batches that full fine-tuning would train on.

        Without gradients, as here, they are spent all the same.
        """
        self._charging = True
        try:
            yield
        finally:
            self._charging = False

    @contextmanager
    def charging(self) -> Iterator[None]:
        """Like `probing`, and forward passes without gradients or in evaluation are spent, too."""
        self._charging = True
        try:
            with self.probing():
                yield
        finally:
            self._charging = False

    def renew(self) -> None:
        """Count by the model as it is now, after its modules have changed."""
        self.costs = CostModel(self.model)

    def charge(self, *args: Any, **kwargs: Any) -> None:
        """Count a forward pass of a copy of the model, which full fine-tuning would not run."""
        graph = self.costs.graph(*args, **kwargs)
        self.spent += self.costs.step(graph, Action(frozenset())).forward

    def close(self) -> None:
        """Stop counting."""
        self._handle.remove()

    def _count(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        learning = model.training and torch.is_grad_enabled()
        if not (learning or self._charging):
            return
        if self._alike and self._processes is not None and self._processes.rank:
            return
        trained = (n for n, p in model.named_parameters() if p.requires_grad and learning)
        action = Action(frozenset(trained), self.detached, frozenset(self.skipped()))
        graph = self.costs.graph(*args, **kwargs)
        self.spent += self.costs.step(graph, action).total
        if not self._probing:
            self.graph, self.batches = graph, self.batches + 1
            reference = self._reference
            full = reference.graph(*args, **kwargs)
            self.full += reference.step(full, Action(reference.names)).total
