"""Backward for the hard samples of a batch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgft.errors import InputError
from rgft.sampling import keep_probability, systematic, weighted_loss, weights


@dataclass(frozen=True, slots=True)
class Selected:
    """The chosen samples of a batch.

    Attributes:
        loss: To call backward on, a scalar; without a gradient if nothing was chosen.
        losses: Of all samples of the batch, `[B]`, without gradients; for the ledger.
        rows: Positions of the chosen samples in the batch, int64 `[b]`, ascending.
        weights: What each of them counts, `[b]`.
    """

    loss: Tensor
    losses: Tensor
    rows: Tensor
    weights: Tensor


def selective_loss(
    losses_of: Callable[[Tensor], Tensor],
    size: int,
    *,
    share: float,
    unbiased: bool = True,
    generator: torch.Generator | None = None,
) -> Selected:
    r"""The loss of a batch by few of its samples: a forward pass of all finds out which.

    Unbiased, sample i is chosen with probability :math:`p_i` proportional to its loss (see
    `rgft.sampling.proportional`; as Katharopoulos & Fleuret 2018) and has weight :math:`1/p_i`, so
    that the gradient's expectation is that of the whole batch's mean loss. One draw of fixed size
    (`systematic`) takes the place of independent ones. Biased, the `share` with the largest losses
    is chosen and the mean is over these alone (as in Ordered SGD, Kawaguchi & Lu 2020). The method
    "selective-backprop" is neither: it chooses by percentiles (`rgft.loss_percentiles`).

    What it costs: with a forward pass as 1 and a backward pass as 2, a whole batch costs 3, and
    this :math:`1 + 3 \cdot \mathrm{share}`. So **it costs more than it saves above a share of
    2/3**. Skipping whole visits by a ledger (`rgft.visits`) needs no extra pass.

    The first pass is in the model's mode as it is: it takes random numbers for dropout, and updates
    running statistics of batch normalisation. The choice waits for the device.

    Args:
        losses_of: Runs the model on the samples at these positions of the batch, int64 `[b]`, and
            returns their losses `[b]`. Called twice.
        size: Samples in the batch, B.
        share: Share of them that is chosen, in (0, 1]; 1 spares the first pass.
        unbiased: Weights 1 / p; False for the hardest samples.
        generator: Of the draw, on the host.

    Raises:
        InputError: The share is out of range, or the losses are not one a sample.

    >>> x = torch.tensor([0.1, 3.0, 2.0, 0.2], requires_grad=True)
    >>> chosen = selective_loss(lambda rows: x[rows] ** 2, 4, share=0.5, unbiased=False)
    >>> chosen.rows.tolist(), chosen.loss.item()
    ([1, 2], 6.5)
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise InputError(f"share is {share!r}; allowed: in (0, 1]")
    everything = torch.arange(size)
    if share == 1:
        losses = _checked(losses_of(everything), size)
        ones = torch.ones(size, dtype=torch.float64)
        return Selected(losses.mean(), losses.detach(), everything, ones)
    with torch.no_grad():
        losses = _checked(losses_of(everything), size)
    found = losses.cpu().double()
    rows, weight = (
        _drawn(found, share, generator)
        if unbiased
        else _hardest(found, max(1, round(share * size)))
    )
    if len(rows) == 0:
        return Selected(losses.new_zeros(()), losses, rows, weight)
    chosen = _checked(losses_of(rows), len(rows))
    loss = weighted_loss(chosen, weight, size if unbiased else len(rows))
    return Selected(loss, losses, rows, weight)


def _drawn(
    losses: Tensor, share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(losses)  # others are always chosen: their trouble is not to be hidden
    p = keep_probability(losses, finite, skip=1 - share, rule="proportional")
    offset = torch.rand((), generator=generator, dtype=torch.float64).item()
    rows = systematic(p, offset).nonzero().flatten()
    return rows, weights(p[rows])


def _hardest(losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(losses.nan_to_num(torch.inf), descending=True, stable=True)
    rows = order[:count].sort().values
    return rows, torch.ones(count, dtype=torch.float64)


def _checked(losses: Tensor, size: int) -> Tensor:
    if losses.shape != (size,):
        raise InputError(
            f"losses are {tuple(losses.shape)} for {size} samples; allowed: one a sample, "
            "as rgft.sample_losses.sample_losses gives them"
        )
    return losses
