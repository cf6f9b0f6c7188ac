"""Policies that choose which components train."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgft.policies.purchase import purchase
from rgft.policies.situation import Situation


def keep(situation: Situation, order: Tensor, top: float, floor: float) -> Tensor:
    """Multiplier 1 for the first `ceil(top * n)` of `order`, `floor` for the rest.

    Args:
        situation: Where it is decided; components in `situation.always` get 1, those in
            `situation.never` stay frozen, and neither compete.
        order: Indices of all components, best first, int64 `[K]`.
        top: Share of the competing components that is kept, in (0, 1].
        floor: Multiplier of the rest; 0 freezes them.
    """
    competing = order[~(situation.always | situation.never)[order]]
    chosen = competing[: max(1, math.ceil(round(top * len(competing), 9)))]
    scale = torch.full((len(order),), floor, dtype=torch.float64)
    scale[chosen] = 1.0
    scale[situation.always] = 1.0
    return scale


def by_error(error: Tensor) -> Tensor:
    """Indices from the largest to the smallest value; ties in the order of the components."""
    return torch.argsort(error, descending=True, stable=True)


def top_share(situation: Situation, top: float, floor: float) -> Tensor:
    """Thresholding: the top P% by error train, the rest get `floor`; all while the map is 0."""
    if situation.error.max() <= 0:
        return torch.ones_like(situation.error)
    return keep(situation, by_error(situation.error), top, floor)


def bought(situation: Situation, rate: float, rate_end: float | None) -> Tensor:
    """The components with the largest sum of E that a step of some cost can train, exactly.

    All are affordable while the map is 0. See `rgft.policies.purchase`.

    Args:
        situation: Where it is decided.
        rate: What a step may cost at the start of the run, as a share of a full one.
        rate_end: The same at its end, linear in the progress between; None for `rate`.
    """
    assert situation.costs is not None  # see Policy.uses_costs
    if rate_end is not None:
        assert situation.progress is not None
        rate += situation.progress * (rate_end - rate)
    values = torch.where(situation.never, 0.0, situation.error)
    always = torch.nonzero(situation.always).flatten().tolist()
    if float(values.max()) <= 0:
        return torch.ones_like(situation.error)
    scale = torch.zeros_like(situation.error)
    scale[list(purchase(values.tolist(), situation.costs, rate, always))] = 1.0
    return scale
