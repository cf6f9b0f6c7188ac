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


def area_under(curve: Curve, limit: float) -> float:
    r"""Mean over costs up to `limit` of the best quality that was measured for at most that cost.

    $$ A = \frac{1}{L} \int_0^L \max(0, \max_{i : c_i \le c} q_i) dc $$

    A staircase from 0: nothing is interpolated, and there is no credit before the cheapest run.

    Example:
        >>> area_under([(1.0, 0.8), (2.0, 0.9)], 4.0)  # 1 x 0, 1 x 0.8, 2 x 0.9
        0.65
    """
    steps = sorted((cost, quality) for cost, quality in curve if cost < limit)
    ends = [*(cost for cost, _ in steps[1:]), limit]
    total, best = 0.0, 0.0
    for (start, quality), end in zip(steps, ends, strict=False):
        best = max(best, quality)
        total += best * (end - start)
    return total / limit
