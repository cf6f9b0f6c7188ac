"""Signals: what the gradients of a component say, as one score per component.

A signal is a function of `Statistics`, the slices of all observed components at one step. Write
your own the same way: `lambda s: s.norm(s.grads, 2) / s.numel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor

from rgft.errors import InputError

NORMS = (1.0, 2.0, math.inf)
MIN_WEIGHT_RMS = 1e-3  # Adafactor's floor on the parameter scale (eps2, Shazeer & Stern 2018)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Slices of K components at one step; slice i belongs to component `owner[i]`.

    A tensor is one slice, or a stack of them where components share a parameter. `norm` and `sum`
    know which; functions of single elements (`g * w`, `g.abs()`) need not.

    Attributes:
        owner: Component index of each slice, int64 `[n]`; those of a stack follow each other.
        numel: Parameter elements per component, `[K]`; its type is the one scores are summed in.
        generator: Source of randomness for the random control.
        grads: Gradients (`gradient` and `update` signals).
        weights: Values before the step.
        updates: What the step added (`update` signals).
        mean_grads: Mean of per-sample gradients (`samples` signals).
        mean_square: Mean over samples of the squared 2-norm per component, `[K]`.
        samples: How many samples the last two are means of.
        stacked: For each tensor, the dimension along which it is a stack of slices, or None if it
            is one slice; empty if all are.
        gathered: Where parameters are sharded: what each process has, `[K]`, of all processes,
            `[R, K]`. The tensors are then the parts that this process holds.
        counted: Which slices this process counts, others having the same, `[n]`; None for all.
    """

    owner: Tensor
    numel: Tensor
    generator: torch.Generator
    grads: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()
    updates: Sequence[Tensor] = ()
    mean_grads: Sequence[Tensor] = ()
    mean_square: Tensor = field(default_factory=lambda: torch.zeros(0))
    samples: int = 0
    stacked: Sequence[int | None] = ()
    gathered: Callable[[Tensor], Tensor] | None = None
    counted: Tensor | None = None

    def norm(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        r"""The p-norm over all slices of each component, `[K]`.

        Slice norms :math:`n_i` are combined as :math:`m (\sum_i (n_i/m)^p)^{1/p}` with
        :math:`m = \max_i n_i`, which neither overflows nor underflows.
        """
        dtype = self.numel.dtype
        stacked = self.stacked or (None,) * len(tensors)
        whole = [t for t, dim in zip(tensors, stacked, strict=True) if dim is None]
        of_whole = iter(torch._foreach_norm(whole, p, dtype) if whole else ())
        norms = self._gather(
            next(of_whole)
            if dim is None
            else torch.linalg.vector_norm(t[..., None], p, _across(t, dim), dtype=dtype)
            for t, dim in zip(tensors, stacked, strict=True)
        )
        joined = self._joined(norms, self.owner, p)
        if self.gathered is None:
            return joined
        rows = self.gathered(joined)
        owners = torch.arange(len(self.numel), device=rows.device).repeat(len(rows))
        return self._joined(rows.flatten(), owners, p)

    def _joined(self, norms: Tensor, owner: Tensor, p: float) -> Tensor:
        """The p-norm of each component from norms of its parts."""
        largest = norms.new_zeros(len(self.numel)).scatter_reduce(0, owner, norms, "amax")
        if p == math.inf:
            return largest
        scale = torch.where(largest > 0, largest, 1.0)
        share = (norms / scale[owner]) ** p
        total = torch.zeros_like(largest).index_add_(0, owner, share)
        return torch.where(largest > 0, scale * total ** (1 / p), largest)

    def sum(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sum over all elements of each component, `[K]`."""
        dtype = self.numel.dtype
        sums = self._gather(
            t.sum(dtype=dtype) if dim is None else t[..., None].sum(_across(t, dim), dtype=dtype)
            for t, dim in zip(tensors, self.stacked or repeat(None), strict=bool(self.stacked))
        )
        found = sums.new_zeros(len(self.numel)).index_add_(0, self.owner, sums)
        return found if self.gathered is None else self.gathered(found).sum(0)

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        r"""Inner product :math:`\langle a, b \rangle` over all slices of each component, `[K]`."""
        dtype = self.numel.dtype  # products of half-precision numbers would underflow
        return self.sum(a.to(dtype) * b for a, b in zip(left, right, strict=True))

    def _gather(self, values: Iterable[Tensor]) -> Tensor:
        """Values of all slices as one vector on the device and in the precision of `numel`."""
        found, like = list(values), self.numel
        if not found:  # all that this process holds is of other components
            return like.new_zeros(0)
        if len({v.device for v in found}) > 1:
            found = [v.to(like.device, non_blocking=True) for v in found]
        joined = torch.cat([v.reshape(-1) for v in found]) if self.stacked else torch.stack(found)
        joined = joined.to(like)
        return joined if self.counted is None else torch.where(self.counted, joined, 0)


def _across(tensor: Tensor, dim: int) -> tuple[int, ...]:
    """All dimensions but `dim`, and one more at the end: none at all would mean all of them."""
    return tuple(d for d in range(tensor.ndim + 1) if d != dim)


@dataclass(frozen=True, slots=True)
class Signal:
    """A score per component, and when it can be computed.

    Attributes:
        score: From `Statistics` to scores `[K]`, each >= 0.
        source: "gradient" (at each step, before the update), "update" (after it: the weights are
            copied to see it) or "samples" (from per-sample gradients on a probe batch).
    """

    score: Callable[[Statistics], Tensor]
    source: str = "gradient"


def grad_norm(s: Statistics, p: float = 2.0) -> Tensor:
    r"""Gradient norm :math:`\|\nabla_{\theta_k} L\|_p`, the published score.

    >>> s = Statistics(torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0]), torch.Generator(),
    ...                grads=[torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([-2.0])])
    >>> grad_norm(s).tolist(), grad_norm(s, 1).tolist(), grad_norm(s, math.inf).tolist()
    ([5.0, 2.0], [7.0, 2.0], [4.0, 2.0])
    """
    return s.norm(s.grads, p)


def rms(s: Statistics) -> Tensor:
    r"""Per-parameter root mean square :math:`\|g_k\|_2 / \sqrt{n_k}`: comparable between sizes."""
    return s.norm(s.grads, 2) / s.numel.sqrt()


def relative(s: Statistics) -> Tensor:
    r"""Relative gradient norm :math:`\|g_k\|_2 / \|\theta_k\|_2` (RGN; Lee et al. 2023).

    The root mean square of the weights is taken as at least 1e-3, so that weights that start at
    zero (biases, LoRA's B) have a finite score.
    """
    return rms(s) / (s.norm(s.weights, 2) / s.numel.sqrt()).clamp_min(MIN_WEIGHT_RMS)


def taylor(s: Statistics) -> Tensor:
    r"""First-order loss change of removing the component, :math:`|g_k \cdot \theta_k|`."""
    return s.dot(s.grads, s.weights).abs()


def decrease(s: Statistics) -> Tensor:
    r"""First-order loss change of this step, :math:`|g_k \cdot \Delta\theta_k|`."""
    return s.dot(s.grads, s.updates).abs()


def improvement(s: Statistics) -> Tensor:
    r"""First-order loss decrease of this step, :math:`\max(0, -g_k \cdot \Delta\theta_k)`.

    The importance of GreenTrainer (Huang et al. 2024); what makes the loss worse counts as nothing.
    """
    return (-s.dot(s.grads, s.updates)).clamp_min(0)


def fisher(s: Statistics) -> Tensor:
    r"""Trace of the empirical Fisher, :math:`\frac1N \sum_n \|\nabla_{\theta_k} \ell_n\|_2^2`.

    From per-sample gradients; squared batch-mean gradients would be another quantity
    (Kunstner et al. 2019).
    """
    return s.mean_square


def signal_to_noise(s: Statistics) -> Tensor:
    r"""Squared mean over variance of per-sample gradients, :math:`\|\bar g_k\|^2 / \sigma_k^2`.

    :math:`\sigma_k^2 = \frac{N}{N-1} (\frac1N \sum_n \|g_{k,n}\|^2 - \|\bar g_k\|^2)` is the
    unbiased total variance; the score is 0 where that is 0, or too small to tell from rounding.
    """
    mean = s.norm(s.mean_grads, 2) ** 2
    variance = (s.mean_square - mean) * s.samples / max(s.samples - 1, 1)
    noise = variance > 8 * torch.finfo(mean.dtype).eps * s.mean_square
    return torch.where(noise, mean / torch.where(noise, variance, 1.0), 0.0)


def constant(s: Statistics) -> Tensor:
    """One everywhere: the control for any use of the gradient."""
    return torch.ones_like(s.numel)


def uniform_random(s: Statistics) -> Tensor:
    """Uniform on [0, 1): the control for any information in the gradient."""
    return torch.rand(len(s.numel), generator=s.generator).to(s.numel, non_blocking=True)


SIGNALS: dict[str, Signal] = {
    "grad-norm": Signal(grad_norm),
    "rms": Signal(rms),
    "relative": Signal(relative),
    "taylor": Signal(taylor),
    "decrease": Signal(decrease, source="update"),
    "improvement": Signal(improvement, source="update"),
    "fisher": Signal(fisher, source="samples"),
    "signal-to-noise": Signal(signal_to_noise, source="samples"),
    "constant": Signal(constant),
    "random": Signal(uniform_random),
}


def find_signal(signal: str | Signal | Callable[[Statistics], Tensor], p: float) -> Signal:
    """The signal of that name, with the norm `p` where it has one; a function as it is.

    Raises:
        InputError: Unknown name.
    """
    if isinstance(signal, Signal):
        return signal
    if callable(signal):
        return Signal(signal)
    if signal not in SIGNALS:
        raise InputError(f"unknown signal '{signal}'; allowed: {', '.join(SIGNALS)}, or a function")
    if signal == "grad-norm":
        return Signal(lambda s: grad_norm(s, p))
    return SIGNALS[signal]
