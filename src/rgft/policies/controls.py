"""Controls: policies that a gain by the error map has to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from rgft.errors import InputError
from rgft.policies.scaling import share_of_max
from rgft.policies.selection import by_error, keep
from rgft.policies.situation import Situation


def uniform(situation: Situation) -> Tensor:
    """Every component at the scheduled rate."""
    return torch.ones_like(situation.error)


def random_share(situation: Situation, top: float, floor: float) -> Tensor:
    """As many components as thresholding trains, drawn anew at each decision."""
    order = torch.randperm(len(situation.error), generator=situation.generator)
    return keep(situation, order, top, floor)


def bottom_share(situation: Situation, top: float, floor: float) -> Tensor:
    """Thresholding upside down: the components with the smallest error train."""
    if situation.error.max() <= 0:
        return torch.ones_like(situation.error)
    return keep(situation, by_error(-situation.error), top, floor)


def inverse(situation: Situation, alpha: float) -> Tensor:
    r""":math:`f_k = 1 + \alpha (1 - E_k / \max_j E_j)`: most where E is least."""
    if situation.error.max() <= 0:
        return torch.ones_like(situation.error)
    return 1 + alpha * (1 - share_of_max(situation.error))


def suffix(situation: Situation, top: float, floor: float) -> Tensor:
    """The `top` share of components nearest to the output, fixed."""
    return keep(situation, by_error(situation.depth), top, floor)


def head_only(situation: Situation) -> Tensor:
    """Linear probing: only the components that always train."""
    return situation.always.double()


def biases(situation: Situation) -> Tensor:
    """BitFit: the bias terms, and what always trains (Ben Zaken et al. 2022).

    Raises:
        InputError: None but new heads consists of biases alone.
    """
    alone = [all(s.parameter.endswith("bias") for s in c.slices) for c in situation.components]
    chosen = torch.tensor(alone)
    competing = ~situation.always
    if bool(competing.any()) and not bool(chosen[competing].any()):
        raise InputError(
            "the policy 'biases' finds no component that holds biases alone; take the granularity "
            "'parameter', or another policy where the model has no biases, as many decoders"
        )
    return (chosen | situation.always).double()


def layerwise_decay(situation: Situation, decay: float) -> Tensor:
    r""":math:`f_k = \xi^{D - d_k}` for depth :math:`d_k` up to :math:`D` (Howard & Ruder 2018)."""
    return decay ** (situation.depth.max() - situation.depth)


def gradual_unfreezing(situation: Situation, unfrozen_by: float) -> Tensor:
    """From the output down, one depth more at a time, all by the share `unfrozen_by` of the run.

    Howard & Ruder 2018. Needs `situation.total_steps`.
    """
    assert situation.total_steps is not None
    depths = sorted({c.depth for c in situation.components}, reverse=True)
    progress = situation.step / (unfrozen_by * situation.total_steps)
    opened = min(len(depths), 1 + int(progress * len(depths)))
    scale = (situation.depth >= depths[opened - 1]).double()
    scale[situation.always] = 1.0
    return scale
