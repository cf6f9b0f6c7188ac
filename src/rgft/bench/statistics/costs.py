"""What quality costs: the price of a target, and quality averaged over prices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]  # (cost, quality)


def cost_to_target(curve: Curve, target: float) -> float:
    """The least cost that was measured to reach `target`; infinite if none did.

    Nothing is interpolated: what was not run gets no credit.

    Example:
        >>> cost_to_target([(1.0, 0.8), (2.0, 0.92), (4.0, 0.95)], 0.9)
        2.0
    """
    return min((cost for cost, quality in curve if quality >= target), default=math.inf)


def area(curve: Curve, low: float, high: float) -> float:
    """Mean quality over costs from `low` to `high`, by trapezoids between measured points.

    Args:
        curve: Measured points.
        low: Least cost.
        high: Largest cost.

    Returns:
        The area divided by high - low; NaN where the points do not span that range.

    Example:
        >>> area([(0.0, 0.0), (1.0, 1.0)], 0.0, 1.0)
        0.5
    """
    points = sorted(curve)
    if not points or points[0][0] > low or points[-1][0] < high or not high > low:
        return math.nan
    costs, quality = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
    inside = costs[(costs > low) & (costs < high)]
    at = np.concatenate([[low], inside, [high]])
    return float(np.trapezoid(np.interp(at, costs, quality), at) / (high - low))
