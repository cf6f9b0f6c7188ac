"""Scores of components from live gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgft.errors import InputError
from rgft.execution.binding import Binding, Division
from rgft.signals import Signal, Statistics

Scores = tuple[Tensor, Tensor]  # per component: the score `[K]`, whether there is one, bool `[K]`


@dataclass(frozen=True, slots=True)
class Layout:
    """Which slices of which components a set of parameters consists of.

    Attributes:
        indices: Which of the adaptable parameters.
        divided: Those that several components share, by position in `indices`.
        owner: See `Statistics`.
        stacked: See `Statistics`.
        observed: Which components are among them, bool `[K]`.
    """

    indices: tuple[int, ...]
    divided: tuple[tuple[int, Division], ...]
    owner: Tensor
    stacked: tuple[int | None, ...]
    observed: Tensor

    def slices(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors, one a parameter, as stacks of slices where components share them."""
        found = list(tensors)
        for position, division in self.divided:
            found[position] = division.blocks(found[position])
        return found


class Measuring:
    """Applies a signal to the parameters that have a gradient. Never waits for the device."""

    def __init__(self, binding: Binding, signal: Signal, generator: torch.Generator) -> None:
        self.signal = signal
        self._generator = generator
        self._numel = binding.numel()
        self._parameters = tuple(binding.parameters.values())
        self._divisions = tuple(binding.divisions[p] for p in self._parameters)
        self._owners = self._owners_of_each()
        self._layout = self._all = self._lay_out(tuple(range(len(self._parameters))))
        self._before: dict[int, Tensor] = {}

    def before_step(self, inverse_scale: Tensor | None) -> Scores | None:
        """Scores of a "gradient" signal; for an "update" signal keep the weights.

        Args:
            inverse_scale: What gradients still have to be multiplied by (a fused optimizer under
                gradient scaling), or None.

        Raises:
            InputError: A gradient is sparse.
        """
        if self.signal.source == "samples":
            return None
        observed = self._with_gradient()
        if self.signal.source == "update":
            self._before = {i: self._parameters[i].detach().clone() for i in observed}
            return None
        if not observed:
            return None
        weights = [self._parameters[i] for i in observed]
        return self._score(observed, self._grads(observed, inverse_scale), weights)

    def after_step(self) -> Scores | None:
        """Scores of an "update" signal, from what the step changed."""
        if not self._before:
            return None
        before, self._before = self._before, {}
        # a frozen component's gradient is gone by now: it has no score
        observed = tuple(i for i in self._with_gradient() if i in before)
        if not observed:
            return None
        weights = [before[i] for i in observed]
        updates = [self._parameters[i].detach() - before[i] for i in observed]
        return self._score(observed, self._grads(observed, None), weights, updates)

    def from_samples(self, losses: Iterable[Tensor]) -> Scores:
        """Scores of a "samples" signal from per-sample losses; gradients are left as they are.

        Raises:
            InputError: There are no samples, or a loss is not a scalar with a gradient.
        """
        parameters = self._parameters
        total = [torch.zeros_like(p, dtype=self._numel.dtype) for p in parameters]
        square = torch.zeros_like(self._numel)
        count = 0
        empty, slices = self._statistics(self._all), self._all.slices
        for loss in losses:
            if loss.ndim != 0 or not loss.requires_grad:
                raise InputError(
                    "the probe must yield scalar per-sample losses that require a gradient"
                )
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            square = square + empty.norm(slices(grads), 2) ** 2
            torch._foreach_add_(total, [g.to(self._numel.dtype) for g in grads])
            count += 1
        if not count:
            raise InputError("the probe yielded no sample")
        statistics = replace(
            empty,
            mean_grads=slices(t / count for t in total),
            mean_square=square / count,
            samples=count,
        )
        return self.signal.score(statistics), self._all.observed

    def _with_gradient(self) -> tuple[int, ...]:
        return tuple(i for i, p in enumerate(self._parameters) if p.grad is not None)

    def _grads(self, observed: Sequence[int], inverse_scale: Tensor | None) -> list[Tensor]:
        found = [self._parameters[i].grad for i in observed]
        grads = [g for g in found if g is not None]
        if any(g.is_sparse for g in grads):
            raise InputError(
                "sparse gradients have no score; build the embedding with sparse=False"
            )
        return grads if inverse_scale is None else list(torch._foreach_mul(grads, inverse_scale))

    def _score(
        self,
        observed: tuple[int, ...],
        grads: list[Tensor],
        weights: Sequence[Tensor],
        updates: Sequence[Tensor] = (),
    ) -> Scores:
        if observed != self._layout.indices:
            self._layout = self._lay_out(observed)
        layout, slices = self._layout, self._layout.slices
        with torch.no_grad():
            statistics = replace(
                self._statistics(layout),
                grads=slices(grads),
                weights=slices(weights),
                updates=slices(updates) if updates else (),
            )
            return self.signal.score(statistics), layout.observed

    def _owners_of_each(self) -> tuple[Tensor, ...]:
        """Component of each slice of each parameter, on the device."""
        owners = [d.owners for d in self._divisions]
        joined = torch.tensor([k for o in owners for k in o], device=self._numel.device)
        return torch.split(joined, [len(o) for o in owners])

    def _lay_out(self, indices: tuple[int, ...]) -> Layout:
        divisions = [self._divisions[i] for i in indices]
        divided = tuple((n, d) for n, d in enumerate(divisions) if d.dim is not None)
        owner = torch.cat([self._owners[i] for i in indices])
        observed = torch.zeros_like(self._numel, dtype=torch.bool).index_fill_(0, owner, True)
        stacked = tuple(d.dim for d in divisions) if divided else ()
        return Layout(indices, divided, owner, stacked, observed)

    def _statistics(self, layout: Layout) -> Statistics:
        """Without any tensors yet."""
        return Statistics(layout.owner, self._numel, self._generator, stacked=layout.stacked)
