"""Policies that draw what trains, uniformly or by importance, anew at each decision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rgft.errors import InputError
from rgft.policies.scaling import share_of_max
from rgft.policies.situation import Situation


def lisa(situation: Situation, active: int) -> Tensor:
    """LISA: layers drawn alike; embeddings and all else train always (Pan et al. 2024).

    Args:
        situation: Where it is decided.
        active: How many layers train between two decisions.
    """
    layers = _layers(situation)
    order = torch.randperm(len(layers), generator=situation.generator)
    return _with(situation, layers, layers[order[:active]])


def badam(situation: Situation) -> Tensor:
    """BAdam: one layer after the other, in an order drawn anew for each cycle (Luo et al. 2024).

    What is beside the layers stays frozen, but for what always trains.

    Args:
        situation: Where it is decided. The order of a cycle depends on its number and on the
            generator's seed alone, so that its decisions agree on it.
    """
    layers = _layers(situation)
    scale = situation.always.double()
    if len(layers):
        cycle, place = divmod(situation.decision, len(layers))
        random = np.random.default_rng([situation.generator.initial_seed(), cycle])
        scale[layers[int(random.permutation(len(layers))[place])]] = 1.0
    return scale


def grass(situation: Situation, active: int, temperature: float) -> Tensor:
    r"""GRASS: layers drawn one after the other, without replacement, by their gradient norm.

    .. math:: p_l \propto \exp(m_l / T), \qquad m_l = E_l / \max_j E_j

    for the mean gradient norm :math:`E_l` of a layer; all else trains always (Tian et al. 2026).

    Args:
        situation: Where it is decided.
        active: How many layers train between two decisions.
        temperature: T; large values draw uniformly.
    """
    layers = _layers(situation)
    order = _drawn(situation, layers, temperature)
    return _with(situation, layers, order[:active])


def misa(situation: Situation, parameter_share: float, temperature: float) -> Tensor:
    """MISA: components by the same probabilities, as many as fit into a share of the parameters.

    They are taken in the order in which they are drawn; one that does not fit is passed over. What
    lies below the first layer does not compete, and stays frozen (Liu et al. 2025).

    Args:
        situation: Where it is decided.
        parameter_share: Most parameter elements that train, as a share of those that compete.
        temperature: T; large values draw uniformly.

    Raises:
        InputError: No component fits into that share.
    """
    free = ~(situation.always | situation.never) & (situation.depth > 0)
    competing = torch.nonzero(free).flatten()
    numel = torch.tensor([c.numel for c in situation.components])
    room = parameter_share * float(numel[competing].sum())
    chosen = []
    for index in _drawn(situation, competing, temperature).tolist():
        if numel[index] <= room:
            room -= float(numel[index])
            chosen.append(index)
    if len(competing) and not chosen:
        raise InputError(
            f"parameter_share is {parameter_share}, less than that of the smallest component; "
            "raise it, or take a finer granularity"
        )
    scale = situation.always.double()
    scale[chosen] = 1.0
    return scale


def drop_backward(situation: Situation, drop: float) -> Tensor:
    """DropBP: each attention and feed-forward block trains with probability 1 - drop.

    With `bypass` the gradient takes the skip connection around the others (Woo et al. 2024). The
    norms of a layer train where all its blocks do, since those inside a branch have no gradient
    without it; what is beside the layers trains always.

    Args:
        situation: Where it is decided.
        drop: Probability with which a block is dropped.

    Raises:
        InputError: There are no such blocks.
    """
    blocks = [c.kind in ("attention", "feed_forward") for c in situation.components]
    if not any(blocks) and not bool(situation.always.all()):
        raise InputError(
            "the policy 'drop-backward' finds no attention or feed-forward blocks; take the "
            "granularity 'block'"
        )
    kept = torch.rand(len(blocks), generator=situation.generator) >= drop
    scale = torch.ones_like(situation.error)
    scale[torch.tensor(blocks) & ~kept] = 0.0
    dropped = {c.depth for c, s in zip(situation.components, scale.tolist(), strict=True) if s == 0}
    for index, component in enumerate(situation.components):
        if component.kind == "norm" and component.depth in dropped:
            scale[index] = 0.0
    return scale


def _layers(situation: Situation) -> Tensor:
    """Indices of the layers that may train."""
    free = ~(situation.always | situation.never)
    found = [c.kind == "layer" and bool(f) for c, f in zip(situation.components, free, strict=True)]
    if not any(found) and bool(free.any()):
        raise InputError(
            "this policy draws layers, and there are none that may train; take the granularity "
            "'layer', and a model that has some"
        )
    return torch.nonzero(torch.tensor(found)).flatten()


def _drawn(situation: Situation, indices: Tensor, temperature: float) -> Tensor:
    """The indices in an order drawn by a softmax of their errors (Gumbel's trick)."""
    if not len(indices):
        return indices
    uniform = torch.rand(len(indices), generator=situation.generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    keys = share_of_max(situation.error[indices]) / temperature + noise
    return indices[torch.argsort(keys, descending=True)]


def _with(situation: Situation, layers: Tensor, chosen: Tensor) -> Tensor:
    """Everything trains but the layers that were not chosen."""
    scale = torch.ones_like(situation.error)
    scale[layers] = 0.0
    scale[chosen] = 1.0
    return scale
