"""Which samples an epoch visits, in which order, with which weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from rgft.errors import InputError
from rgft.residuals import Ledger
from rgft.sampling import KeepRule, check_skip, find_rule, keep_probability, systematic, weights


class VisitSampler(Sampler[int]):
    r"""The visits of each epoch, drawn from a ledger: samples that are well predicted come less often.

    Sample i is visited with probability :math:`p_i` (`keep_probability` of the ledger as it is when
    the epoch begins) and has weight :math:`w_i = 1/p_i`, so that
    :math:`E \sum_{\text{visits}} w_i \nabla\ell_i = \sum_i \nabla\ell_i` for any given parameters.
    Call backward on `weighted_loss(losses, sampler.weights[ids], batch_size)`; see there what to
    divide by. What no one has seen is always visited, so the first epoch is a full one.

    Give it to a `DataLoader` as `sampler`, with the same `batch_size`. Each iteration is the next
    epoch. The draw depends on seed, epoch and ledger alone. With several processes each takes its
    share of one draw: all ledgers must be the same (see `Ledger.update`), shares are disjoint and
    of equal length. Where the draw does not divide evenly the first visits are repeated, and the
    weight of such a sample is halved, so that the sum stays unbiased.

    Args:
        ledger: Residuals of the training samples.
        batch_size: Samples of a step on one process.
        epochs: Epochs of the run, which may be a fraction.
        skip: How much is skipped, in [0, 1): see `keep_probability`; 0 visits everything.
        rule: A name in `rgft.sampling.RULES`, or a function of residuals and skip.
        full_pass: Share of the run at its end that visits everything, in [0, 1], rounded up to
            whole epochs (Qin et al. 2024 take 0.125); 0 for none.
        unbiased: Weights 1 / p; False for 1, which turns training towards hard samples.
        lengths: Length of each sample, `[N]`. Batches then hold samples of like length, because
            padding is compute.
        bucket: With lengths: batches whose samples are sorted among each other.
        seed: Of draws and orders.
        rank: Number of this process.
        ranks: Number of processes.

    Raises:
        InputError: A setting is out of range.

    >>> ledger = Ledger(4)
    >>> sampler = VisitSampler(ledger, batch_size=2, epochs=3, skip=0.5, full_pass=0)
    >>> sorted(sampler)
    [0, 1, 2, 3]
    >>> ledger.update(torch.arange(4), torch.tensor([0.1, 0.1, 5.0, 4.0]))
    >>> visited = sorted(sampler)
    >>> len(visited), visited[1:], sampler.weights[visited].tolist()
    (3, [2, 3], [2.0, 1.0, 1.0])
    """

    def __init__(  # noqa: PLR0913 - all but three have defaults
        self,
        ledger: Ledger,
        *,
        batch_size: int,
        epochs: float,
        skip: float = 0.5,
        rule: str | KeepRule = "below-mean",
        full_pass: float = 0.125,
        unbiased: bool = True,
        lengths: Sequence[int] | Tensor | None = None,
        bucket: int = 50,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        whole = {"batch_size": batch_size, "bucket": bucket, "ranks": ranks, "seed": seed + 1}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                least = 0 if name == "seed" else 1
                raise InputError(f"{name} is {value - 1 + least!r}; allowed: whole, >= {least}")
        if not 0 < epochs < math.inf:
            raise InputError(f"epochs is {epochs!r}; allowed: a finite number > 0")
        if not 0 <= full_pass <= 1:
            raise InputError(f"full_pass is {full_pass!r}; allowed: in [0, 1]")
        if not 0 <= rank < ranks:
            raise InputError(f"rank is {rank!r}; allowed: 0 to {ranks - 1}, below ranks")
        if lengths is not None and len(lengths) != len(ledger):
            raise InputError(
                f"there are {len(lengths)} lengths for {len(ledger)} samples; give one a sample"
            )
        check_skip(skip)
        find_rule(rule)
