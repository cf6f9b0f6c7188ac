"""Easy, hard, forgotten or suspect: what a sample's losses over training say about it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KINDS = ("unseen", "easy", "hard", "forgotten", "suspect")
FENCE = 1.5  # interquartile ranges above the upper quartile: Tukey's (1977) mark of an outlier


def sample_kinds(residual: Tensor, visits: Tensor, correct: Tensor, forgotten: Tensor) -> Tensor:
    """What kind of sample each is; of the rules the last that holds counts.

    - unseen: never visited.
    - easy: residual below the mean of all seen, the ones that `below_mean` may skip.
    - hard: residual at or above it.
    - forgotten: right at some visit and wrong at the next one (Toneva et al. 2019).
    - suspect: visited at least twice, never right (where that is known), and with a residual that
      is an outlier: above the upper quartile of all seen by more than 1.5 interquartile ranges
      (Tukey 1977). A look at its label may be worthwhile.

    That wrong labels show as samples that stay wrong throughout training is the finding behind
    AUM (Pleiss et al. 2020) and dataset cartography (Swayamdipta et al. 2020); confident learning
    (Northcutt et al. 2021) asks for confident disagreement. This rule sees only losses: it cannot
    tell a wrong label from a rare or a truly hard sample, and its list is one to read, not to drop.

    Args:
        residual: `[N]`; NaN where never seen.
        visits: `[N]`.
        correct: Visits at which it was right, `[N]`; 0 where that is not known.
        forgotten: Forgetting events, `[N]`.

    Returns:
        Positions in `KINDS`, int64 `[N]`.

    >>> residual = torch.tensor([0.1, 0.2, 0.1, 0.3, 9.0, torch.nan])
    >>> visits, correct = torch.tensor([2, 2, 2, 2, 2, 0]), torch.tensor([2, 2, 1, 2, 0, 0])
    >>> forgotten = torch.tensor([0, 0, 1, 0, 0, 0])
    >>> [KINDS[k] for k in sample_kinds(residual, visits, correct, forgotten)]
    ['easy', 'easy', 'forgotten', 'easy', 'suspect', 'unseen']
    """
    residual, seen = residual.double(), visits > 0
    result = torch.zeros(len(residual), dtype=torch.int64)
    if not seen.any():
        return result
    values = residual[seen]
    mean = values.mean().clamp(max=values.max())  # the mean of equal values can round up
    lower, upper = np.quantile(values.numpy(), (0.25, 0.75))
    result[seen & (residual < mean)] = KINDS.index("easy")
    result[seen & (residual >= mean)] = KINDS.index("hard")
    result[seen & (forgotten > 0)] = KINDS.index("forgotten")
    stubborn = (visits >= 2) & (correct == 0)
    outlying = residual > upper + FENCE * (upper - lower)
    result[seen & stubborn & outlying] = KINDS.index("suspect")
    return result
