"""What can be asked of any policy's multipliers."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_one(lr_scale: Tensor) -> Tensor:
    """Multipliers divided by their mean over the trained components; 0 stays 0.

    A comparison with a uniform learning rate is then one at equal mean learning rate.

    >>> mean_one(torch.tensor([1.0, 3.0, 0.0])).tolist()
    [0.5, 1.5, 0.0]
    """
    trained = lr_scale > 0
    return lr_scale / lr_scale[trained].mean() if trained.any() else lr_scale


def hold(proposed: Tensor, previous: Tensor, stayed: Tensor, min_stay: int) -> Tensor:
    """No switch between frozen and trained before `min_stay` steps in the present state.

    Args:
        proposed: Multipliers that the policy wants, `[K]`.
        previous: Multipliers in force, `[K]`.
        stayed: Steps since each component last switched, `[K]`.
        min_stay: Fewest steps between two switches of a component.
    """
    switches = (proposed > 0) != (previous > 0)
    return torch.where(switches & (stayed < min_stay), previous, proposed)
