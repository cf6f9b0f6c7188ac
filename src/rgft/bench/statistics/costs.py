"""What quality costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]  # (cost, quality)


def cost_to_target(curve: Curve, target: float) -> float:
    """The least cost that was measured to reach `target`; infinite if none did.

    Nothing is interpolated: what was not run gets no credit.

    Example:
        >>> cost_to_target([(1.0, 0.8), (2.0, 0.92), (4.0, 0.95)], 0.9)
        2.0
    """
    return min((cost for cost, quality in curve if quality >= target), default=math.inf)
