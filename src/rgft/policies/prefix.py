"""A policy that freezes the lowest layers, for good, once their gradients have settled."""

from __future__ import annotations

import torch
from torch import Tensor

from rgft.policies.situation import Situation


def autofreeze(situation: Situation) -> Tensor:
    r"""Freezes from the input up, while a layer's gradient changes less than that of the median.

    .. math:: \eta_l = \frac{|E_l^{t-1} - E_l^t|}{E_l^{t-1}}

    is the relative change of a layer's gradient norm between two decisions. A layer is frozen if
    all below it are, and :math:`\eta_l` is less than the median over the layers that still train
    (Liu et al. 2021). What is frozen stays so. Components of the same depth go together.
    """
    scale = torch.ones_like(situation.error)
    trained = situation.trained & ~situation.never
    if situation.previous_error is None:
        return scale
    depth = situation.depth
    free = trained & ~situation.always
    changes: dict[float, float] = {}
    for level in sorted(set(depth[free].tolist())):
        at = free & (depth == level)
        before = float(situation.previous_error[at].sum())
        now = float(situation.error[at].sum())
        changes[level] = abs(before - now) / before if before > 0 else 0.0
    scale[~trained] = 0.0
    if changes:
        middle = float(torch.tensor(list(changes.values()), dtype=torch.float64).quantile(0.5))
        for level, change in changes.items():
            if change >= middle:
                break
            scale[free & (depth == level)] = 0.0
    scale[situation.always] = 1.0
    return scale
