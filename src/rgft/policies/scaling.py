"""Policies that scale learning rates by the error map, as published."""

from __future__ import annotations

import torch
from torch import Tensor

from rgft.policies.situation import Situation


def share_of_max(error: Tensor) -> Tensor:
    r""":math:`E_k / \max_j E_j`, `[K]`; 0 everywhere while the map is all 0."""
    largest = error.max()
    return error / largest if largest > 0 else torch.zeros_like(error)


def normalized_max(situation: Situation, alpha: float) -> Tensor:
    r""":math:`f_k = 1 + \alpha E_k / \max_j E_j`, in [1, 1 + alpha]."""
    return 1 + alpha * share_of_max(situation.error)


def normalized_sum(situation: Situation, alpha: float) -> Tensor:
    r""":math:`f_k = 1 + \alpha K E_k / \sum_j E_j`, of mean 1 + alpha; 1 while E is all 0."""
    share = share_of_max(situation.error)
    total = share.sum()
    return 1 + alpha * len(share) * share / total if total > 0 else torch.ones_like(share)


def rank_based(situation: Situation, alpha: float) -> Tensor:
    r""":math:`f_k = 1 + \alpha (K - r_k) / (K - 1)`: rank 1 (largest E) gets 1 + alpha, rank K 1.

    Ties share the mean of their ranks; a single component gets 1 + alpha; an all-zero map gives 1.
    """
    error = situation.error
    if error.max() <= 0:
        return torch.ones_like(error)
    if len(error) == 1:
        return torch.full_like(error, 1 + alpha)
    smaller = (error[:, None] > error[None, :]).sum(1).to(error)
    ties = (error[:, None] == error[None, :]).sum(1) - 1
    return 1 + alpha * (smaller + ties / 2) / (len(error) - 1)


def proportional(situation: Situation) -> Tensor:
    r""":math:`f_k = E_k / \max_j E_j`, as in Auto-RGN (Lee et al. 2023); 1 while E is all 0.

    Components in `situation.always` get 1 and are not among the j: beside the zeros that a new head
    starts from, the relative gradient norm of everything else would vanish.
    """
    competing = ~situation.always
    scale = torch.ones_like(situation.error)
    if competing.any() and situation.error[competing].max() > 0:
        scale[competing] = share_of_max(situation.error[competing])
    return scale
