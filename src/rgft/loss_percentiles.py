"""Which samples of a batch get a backward pass, by where their losses stand among recent ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rgft.transfer import to_host

RECENT = 1024  # losses that are remembered


class LossPercentiles:
    r"""Chooses hard samples by chance, as Selective-Backprop does (Jiang et al. 2019).

    A sample of loss L is chosen with probability

    .. math:: p(L) = \mathrm{CDF}_R(L)^\beta

    with the share of the last R losses that are not larger than L. Of losses like those the share
    1 / (1 + beta) is chosen. If none is, the hardest is.

    Args:
        beta: The exponent, > 0.
        seed: Of the draws.
        recent: R.

    >>> chooser = LossPercentiles(beta=2.0, seed=0)
    >>> chooser.probabilities(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [0.0625, 0.25, 0.5625, 1.0]
    """

    def __init__(self, beta: float, seed: int, recent: int = RECENT) -> None:
        self._beta, self._recent = beta, recent
        self._losses = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def probabilities(self, losses: Tensor) -> Tensor:
        """Take losses into the memory; the probability with which each is chosen, `[B]`."""
        found = to_host(losses).double()
        self._losses = torch.cat([self._losses, found])[-self._recent :]
        ranked = self._losses.sort().values
        not_larger = torch.searchsorted(ranked, found, right=True)
        return (not_larger.double() / len(ranked)) ** self._beta

    def choose(self, losses: Tensor) -> Tensor:
        """Positions of the chosen samples, int64 `[b]` on the host, ascending, at least one."""
        found = to_host(losses)
        p = self.probabilities(found)
        drawn = torch.rand(len(p), generator=self._generator, dtype=torch.float64) < p
        if not bool(drawn.any()):
            drawn[found.argmax()] = True
        return drawn.nonzero().flatten()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"losses": self._losses.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._losses = state["losses"].clone()
        self._generator.set_state(state["generator"])
