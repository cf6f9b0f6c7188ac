"""Scores of components from live gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rgft.errors import InputError
from rgft.execution.binding import Binding, Piece
from rgft.signals import Signal, Statistics

Scores = tuple[Tensor, Tensor]  # per component: the score `[K]`, whether there is one, bool `[K]`


class Measuring:
    """Applies a signal to the pieces that have a gradient. Never waits for the device."""

    def __init__(self, binding: Binding, signal: Signal, generator: torch.Generator) -> None:
        self.signal = signal
        self._binding = binding
        self._generator = generator
        self._numel = binding.numel()
        self._owners: dict[tuple[int, ...], Scores] = {}
        self._observed: list[Piece] = []
        self._before: list[Tensor] = []

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
        self._observed = [p for p in self._binding.pieces if p.parameter.grad is not None]
        if not self._observed:
            return None
        if self.signal.source == "update":
            self._before = [p.weight.clone() for p in self._observed]
            return None
        return self._score(
            grads=self._grads(inverse_scale), weights=[p.weight for p in self._observed]
        )

    def after_step(self) -> Scores | None:
        """Scores of an "update" signal, from what the step changed."""
        if self.signal.source != "update" or not self._observed:
            return None
        taken = [  # a frozen component's gradient is gone by now: it has no score
            (p, before)
            for p, before in zip(self._observed, self._before, strict=True)
            if p.parameter.grad is not None
        ]
        self._observed = [p for p, _ in taken]
        self._before = []
        if not taken:
            return None
        weights = [before for _, before in taken]
        updates = [p.weight - before for p, before in taken]
        return self._score(grads=self._grads(None), weights=weights, updates=updates)

    def from_samples(self, losses: Iterable[Tensor]) -> Scores:
        """Scores of a "samples" signal from per-sample losses; gradients are left as they are.

        Raises:
            InputError: There are no samples, or a loss is not a scalar with a gradient.
        """
        parameters = list(self._binding.parameters.values())
        position = {p: i for i, p in enumerate(parameters)}
        pieces = self._observed = list(self._binding.pieces)
        owner, observed = self._owner()
        total = [torch.zeros_like(p, dtype=self._numel.dtype) for p in parameters]
        square = torch.zeros_like(self._numel)
        count = 0
        for loss in losses:
            if loss.ndim != 0 or not loss.requires_grad:
                raise InputError(
                    "the probe must yield scalar per-sample losses that require a gradient"
                )
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            slices = [p.slice.of(grads[position[p.parameter]]) for p in pieces]
            norms = torch.stack(torch._foreach_norm(slices, 2, self._numel.dtype)).to(square)
            square = square.index_add(0, owner, norms**2)
            torch._foreach_add_(total, [g.to(self._numel.dtype) for g in grads])
            count += 1
        if not count:
            raise InputError("the probe yielded no sample")
        means = [p.slice.of(total[position[p.parameter]]) / count for p in pieces]
        statistics = Statistics(
            owner,
            self._numel,
            self._generator,
            mean_grads=means,
            mean_square=square / count,
            samples=count,
        )
        return self.signal.score(statistics), observed

    def _grads(self, inverse_scale: Tensor | None) -> list[Tensor]:
        grads = [p.grad for p in self._observed]
        if any(g.is_sparse for g in grads):
            raise InputError(
                "sparse gradients have no score; build the embedding with sparse=False"
            )
        return grads if inverse_scale is None else list(torch._foreach_mul(grads, inverse_scale))

    def _score(
        self, grads: list[Tensor], weights: list[Tensor], updates: Sequence[Tensor] = ()
    ) -> Scores:
        owner, observed = self._owner()
        statistics = Statistics(
            owner, self._numel, self._generator, grads=grads, weights=weights, updates=updates
        )
        return self.signal.score(statistics), observed

    def _owner(self) -> Scores:
        """Component index of each observed piece, and which components are observed."""
        key = tuple(p.component for p in self._observed)
        if key not in self._owners:
            owner = torch.tensor(key, device=self._numel.device)
            observed = torch.zeros_like(self._numel, dtype=torch.bool)
            observed[owner] = True
            self._owners[key] = (owner, observed)
        return self._owners[key]
