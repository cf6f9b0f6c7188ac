"""Every outcome of a systematic draw, with its probability."""

from __future__ import annotations

import itertools

from torch import Tensor


def offsets(p: Tensor) -> list[tuple[float, float]]:
    """Intervals of the offset on which the draw is the same: (length, an offset in the middle)."""
    ends = p[p < 1].double().cumsum(0)
    edges = sorted({0.0, 1.0, *(ends % 1).tolist()})
    return [(high - low, (low + high) / 2) for low, high in itertools.pairwise(edges)]
