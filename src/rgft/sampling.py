"""Which samples to visit, with which probability and weight: pure rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rgft.errors import InputError

KeepRule = Callable[[Tensor, float], Tensor]
"""Residuals `[n]` and `skip` to probabilities `[n]` in (0, 1]."""

FLOOR = 0.25  # least probability of `proportional`, as a share of the mean: weights stay bounded
HALVINGS = 80  # of an interval of logarithms: what is left is below rounding


def below_mean(residual: Tensor, skip: float) -> Tensor:
    r"""Samples below the mean residual are kept with probability 1 - skip, the others always.

    .. math:: p_i = 1 - \mathrm{skip} \cdot [R_i < \bar R]

    Soft pruning as in InfoBatch (Qin et al. 2024). What it saves depends on the residuals: with
    long tails more than half of them lie below their mean.

    >>> below_mean(torch.tensor([0.1, 0.2, 3.0]), 0.25).tolist()
    [0.75, 0.75, 1.0]
    """
    # the mean of equal values can round to more than the value
    mean = residual.mean().clamp(max=residual.max())
    return 1 - skip * (residual < mean).to(residual)


def proportional(residual: Tensor, skip: float, floor: float = FLOOR) -> Tensor:
    r"""Probabilities proportional to the residual, between a floor and 1, with mean 1 - skip.

    .. math:: p_i = \min(1, \max(\phi \bar p, c R_i)), \qquad \bar p = 1 - \mathrm{skip}

    with floor :math:`\phi` and the one c that gives this mean. It is sampling with probability
    proportional to size (Horvitz & Thompson 1952), with the loss as a stand-in for the gradient
    norm, which would be optimal (Katharopoulos & Fleuret 2018). Weights 1 / p are at most
    1 / (floor (1 - skip)), and the expected number of visits is known: (1 - skip) n.

    Args:
        residual: `[n]`, >= 0.
        skip: Share of visits that is saved, in [0, 1).
        floor: Least probability, as a share of the mean one, in (0, 1]; 1 makes all equal.

    >>> proportional(torch.tensor([0.0, 1.0, 2.0, 9.0]), 0.5).tolist()
    [0.125, 0.291..., 0.583..., 1.0]
    """
    if not 0 < floor <= 1:
        raise InputError(f"floor is {floor!r}; allowed: in (0, 1]")
    if (residual < 0).any():
        raise InputError(
            f"a residual is {float(residual.min())}; proportional probabilities need residuals "
            "that are not negative: use the rule 'below-mean'"
        )
    target, largest = 1 - skip, residual.max()
    if largest == 0:
        return torch.full_like(residual, target)
    # where all but zeros are certain to be kept, the zeros take up the rest
    size = (residual / largest).clamp_min(1e-12)
    low, high = torch.log(size.new_tensor(floor * target)), -torch.log(size.min())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_few = (middle.exp() * size).clamp(floor * target, 1).mean() < target
        low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
    return (high.exp() * size).clamp(floor * target, 1)


RULES: dict[str, KeepRule] = {"below-mean": below_mean, "proportional": proportional}


def keep_probability(
    residual: Tensor, seen: Tensor, *, skip: float, rule: str | KeepRule = "below-mean"
) -> Tensor:
    """The probability with which each sample is visited.

    Args:
        residual: Of each sample, `[N]`; ignored where not `seen`.
        seen: Whether a sample has a residual, bool `[N]`. One that has none is always visited.
        skip: How much is skipped, in [0, 1): for "below-mean" the share of the samples below the
            mean, for "proportional" the share of all that have been seen.
        rule: A name in `rgft.sampling.RULES`, or a function of residuals `[n]` and `skip`.

    Returns:
        float64 `[N]`, in (0, 1].

    Raises:
        InputError: `skip` or the rule is not allowed, or the rule returns no probabilities.

    >>> residual, seen = torch.tensor([0.1, 3.0, 0.0]), torch.tensor([True, True, False])
    >>> keep_probability(residual, seen, skip=0.5).tolist()
    [0.5, 1.0, 1.0]
    """
    check_skip(skip)
    chosen = find_rule(rule)
    p = torch.ones(len(residual), dtype=torch.float64, device=residual.device)
    if skip > 0 and seen.any():
        found = chosen(residual[seen].double(), skip)
        if found.shape != p[seen].shape or not ((found > 0) & (found <= 1)).all():
            raise InputError(
                f"the rule {rule!r} returned something else than a probability in (0, 1] for each "
                "residual; a sample that can never be visited would bias the gradient"
            )
        p[seen] = found.double()
    return p


def weights(p: Tensor, unbiased: bool = True) -> Tensor:
    """What a visit that had probability p counts: 1 / p, or 1 where a bias is wanted.

    >>> weights(torch.tensor([0.5, 1.0])).tolist()
    [2.0, 1.0]
    """
    return 1 / p if unbiased else torch.ones_like(p)


def systematic(p: Tensor, offset: float) -> Tensor:
    r"""A draw in which sample i is kept with probability exactly :math:`p_i`, of a fixed size.

    The probabilities are laid end to end on a line, and what the points offset, offset + 1, ...
    fall on is kept, for one offset uniform on [0, 1) (Madow 1949). So the number kept is the sum of
    p, rounded down or up, where independent draws would have it vary from epoch to epoch. Shuffle
    beforehand, because neighbours exclude each other.

    Args:
        p: In (0, 1], `[N]`; those that are 1 are always kept.
        offset: In [0, 1).

    Returns:
        Whether each is kept, bool `[N]`.

    >>> p = torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5])
    >>> systematic(p, 0.2).tolist(), systematic(p, 0.7).tolist()
    ([True, False, True, True, False], [False, True, True, False, True])
    """
    kept = p >= 1
    ends = p[~kept].double().cumsum(0)
    points = torch.ceil(ends - offset)  # how many lie before each end
    before = torch.cat([points.new_zeros(1), points[:-1]])
    kept[~kept] = points > before
    return kept


def weighted_loss(losses: Tensor, weights: Tensor, batch_size: float) -> Tensor:
    r"""The loss to call backward on, such that the gradient over an epoch is unbiased.

    .. math:: L = \frac1B \sum_{i \in \text{batch}} w_i \ell_i

    Mind the divisor. With samples visited with probability p and weighted by 1/p, the sum over an
    epoch's batches has the expectation :math:`\frac1B \sum_{i=1}^N \nabla\ell_i`, which is what all
    batches of full data sum to. Dividing by the sum of the weights, a random number, would undo
    that. So B is the size of a full batch even where the last one is short.

    The epoch then has fewer steps, each larger by N / visits. To make instead every *step* an
    unbiased estimate of the mean gradient over all samples (steps of the usual size, fewer of
    them), give B · N / visits for `batch_size`. Adam divides the gradient's scale out, and makes
    steps of the usual size either way.

    Args:
        losses: Of the samples in the batch, `[b]`.
        weights: Of the same samples, `[b]`.
        batch_size: The divisor B.

    >>> weighted_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]), batch_size=4).item()
    1.25
    """
    return (weights.to(losses) * losses).sum() / batch_size


def class_weights(labels: Tensor, exponent: float) -> Tensor:
    r"""What a sample of each class counts, so that rare classes are not drowned by frequent ones.

    .. math:: w_c \propto (N / N_c)^b, \qquad \frac1N \sum_c N_c w_c = 1

    Args:
        labels: Classes of the training samples, whole numbers `[N]`.
        exponent: b; 0 counts all samples alike, 1 all classes.

    Returns:
        float64 `[C]`; 0 for a class without samples.

    >>> class_weights(torch.tensor([0, 0, 0, 1]), 1.0).tolist()
    [0.666..., 2.0]
    """
    counts = torch.bincount(labels).double()
    raw = torch.where(counts > 0, (len(labels) / counts.clamp_min(1)) ** exponent, 0)
    return raw * len(labels) / (raw * counts).sum()


def check_skip(skip: float) -> None:
    """Refuse what is no share of samples to skip."""
    if isinstance(skip, bool) or not isinstance(skip, (int, float)) or not 0 <= skip < 1:
        raise InputError(
            f"skip is {skip!r}; allowed: in [0, 1), and what is always skipped is never learned"
        )


def find_rule(rule: str | KeepRule) -> KeepRule:
    """The function that a name stands for.

    Raises:
        InputError: None has that name.
    """
    if isinstance(rule, str) and rule in RULES:
        return RULES[rule]
    if callable(rule):
        return rule
    raise InputError(
        f"rule is {rule!r}; allowed: {', '.join(RULES)}, or a function of residuals and skip"
    )
