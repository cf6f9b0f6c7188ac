"""Scores of components from live gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgft.errors import InputError
from rgft.execution.binding import Binding, Division
from rgft.processes import Processes
from rgft.shards import counts_here, local
from rgft.signals import Signal, Statistics

Scores = tuple[Tensor, Tensor]  # per component: the score `[K]`, whether there is one, bool `[K]`


@dataclass(frozen=True, slots=True)
class Layout:
    """Which slices of which components a set of parameters consists of.

    Attributes:
        indices: Which of the adaptable parameters.
        held: Those of them of which this process holds any element.
        divided: Those that several components share, by position in `held`.
        owner: See `Statistics`.
        stacked: See `Statistics`.
        observed: Which components are among them, bool `[K]`.
        counted: See `Statistics`.
    """

    indices: tuple[int, ...]
    held: tuple[int, ...]
    divided: tuple[tuple[int, Division], ...]
    owner: Tensor
    stacked: tuple[int | None, ...]
    observed: Tensor
    counted: Tensor | None

    def slices(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors, one a parameter, as stacks of slices where components share them."""
        found = list(tensors)
        for position, division in self.divided:
            found[position] = division.blocks(found[position])
        return found


class Measuring:
    """Applies a signal to the parameters that have a gradient. Never waits for the device."""

    def __init__(
        self,
        binding: Binding,
        signal: Signal,
        generator: torch.Generator,
        processes: Processes | None = None,
    ) -> None:
        self.signal = signal
        self._generator = generator
        self._sharers = processes if binding.sharded else None
        self._numel = binding.numel()
        self._parameters = tuple(binding.parameters.values())
        self._divisions = tuple(binding.held[p] for p in self._parameters)
        self._owners = self._owners_of_each(self._divisions)
        whole = [binding.divisions[p] for p in self._parameters]
        self._all_owners = self._owners_of_each(whole) if binding.sharded else self._owners
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
            self._before = {i: self._here(i).clone() for i in observed}
            return None
        if not observed:
            return None
        held = self._laid_out(observed).held
        weights = [self._here(i) for i in held]
        return self._score(self._grads(held, inverse_scale), weights)

    def after_step(self) -> Scores | None:
        """Scores of an "update" signal, from what the step changed."""
        if not self._before:
            return None
        before, self._before = self._before, {}
        # a frozen component's gradient is gone by now: it has no score
        observed = tuple(i for i in self._with_gradient() if i in before)
        if not observed:
            return None
        held = self._laid_out(observed).held
        weights = [before[i] for i in held]
        updates = [self._here(i) - before[i] for i in held]
        return self._score(self._grads(held, None), weights, updates)

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
        grads = [local(g) for g in found if g is not None]
        if any(g.is_sparse for g in grads):
            raise InputError(
                "sparse gradients have no score; build the embedding with sparse=False"
            )
        if inverse_scale is None or not grads:
            return grads
        return list(torch._foreach_mul(grads, local(inverse_scale)))

    def _here(self, index: int) -> Tensor:
        """What this process holds of a parameter."""
        return local(self._parameters[index].detach())

    def _laid_out(self, observed: tuple[int, ...]) -> Layout:
        """The layout of the parameters that have a gradient now."""
        if observed != self._layout.indices:
            self._layout = self._lay_out(observed)
        return self._layout

    def _score(
        self,
        grads: list[Tensor],
        weights: Sequence[Tensor],
        updates: Sequence[Tensor] = (),
    ) -> Scores:
        layout, slices = self._layout, self._layout.slices
        with torch.no_grad():
            statistics = replace(
                self._statistics(layout),
                grads=slices(grads),
                weights=slices(weights),
                updates=slices(updates) if updates else (),
            )
            return self.signal.score(statistics), layout.observed

    def _owners_of_each(self, divisions: Sequence[Division]) -> tuple[Tensor, ...]:
        """Component of each slice of each parameter, on the device."""
        owners = [d.owners for d in divisions]
        joined = torch.tensor([k for o in owners for k in o], device=self._numel.device)
        return torch.split(joined, [len(o) for o in owners])

    def _joined(self, indices: Sequence[int], *, whole: bool = False) -> Tensor:
        """Owners of slices: of what this process holds, or of the whole parameters."""
        owners = self._all_owners if whole else self._owners
        none = torch.zeros(0, dtype=torch.int64, device=self._numel.device)
        return torch.cat([none, *(owners[i] for i in indices)])

    def _counted(self, held: Sequence[int]) -> Tensor | None:
        """Whether this process counts each slice, where processes hold parts."""
        if self._sharers is None:
            return None
        first = self._sharers.rank == 0
        counts = [counts_here(self._parameters[i], first=first) for i in held]
        each = [c for i, c in zip(held, counts, strict=True) for _ in self._divisions[i].owners]
        return torch.tensor(each, dtype=torch.bool, device=self._numel.device)

    def _lay_out(self, indices: tuple[int, ...]) -> Layout:
        held = tuple(i for i in indices if self._here(i).numel())
        divisions = [self._divisions[i] for i in held]
        divided = tuple((n, d) for n, d in enumerate(divisions) if d.dim is not None)
        owner = self._joined(held)
        observed = torch.zeros_like(self._numel, dtype=torch.bool)
        observed.index_fill_(0, self._joined(indices, whole=True), True)
        stacked = tuple(d.dim for d in divisions) if divided else ()
        return Layout(indices, held, divided, owner, stacked, observed, self._counted(held))

    def _statistics(self, layout: Layout) -> Statistics:
        """Without any tensors yet."""
        return Statistics(
            layout.owner,
            self._numel,
            self._generator,
            stacked=layout.stacked,
            gathered=None if self._sharers is None else self._sharers.gathered,
            counted=layout.counted,
        )
