"""In which order samples are visited: by length, and evenly among processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def by_length(
    visits: Tensor, lengths: Tensor, batch: int, bucket: int, generator: torch.Generator
) -> Tensor:
    """Visits reordered so that those of a batch have like lengths; a permutation of them.

    Within each `bucket` batches the visits are sorted by length and cut into batches, and all
    batches are then shuffled. A last short batch stays the last.

    Args:
        visits: Numbers of samples in random order, `[n]`.
        lengths: Length of each sample, `[N]`.
        batch: Samples in a batch.
        bucket: Batches that are sorted together.
        generator: Of the order of the batches.

    >>> lengths = torch.tensor([9, 1, 8, 2, 5])
    >>> visits = by_length(torch.arange(5), lengths, 2, 2, torch.Generator().manual_seed(0))
    >>> sorted(visits.view(-1)[:4].view(2, 2).tolist()), visits[4].item()
    ([[1, 3], [2, 0]], 4)
    """
    full = len(visits) // batch * batch
    order = torch.argsort(lengths[visits], stable=True)
    group = torch.arange(len(visits)) // (batch * bucket)
    group[full:] = len(visits)  # the short batch is a bucket of its own
    order = order[torch.argsort(group[order], stable=True)]
    batches = visits[order[:full]].view(-1, batch)
    shuffled = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([shuffled.flatten(), visits[order[full:]]])


def evened(visits: Tensor, ranks: int) -> Tensor:
    """Visits, the first of them repeated until they divide evenly among processes.

    >>> evened(torch.tensor([5, 6, 7]), 2).tolist()
    [5, 6, 7, 5]
    """
    total = math.ceil(len(visits) / ranks) * ranks
    return visits[torch.arange(total) % max(1, len(visits))]
