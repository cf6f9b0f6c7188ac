"""Performance profiles over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping


def performance_profile(
    costs: Mapping[str, Mapping[str, float]],
) -> dict[str, list[tuple[float, float]]]:
    """For each arm the share of tasks that it solves within a factor of the cheapest arm's cost.

    $$ rho_s(tau) = |{t : c_{t,s} <= tau min_s c_{t,s}}| / |T| $$

    Dolan and More (2002). Tasks that no arm solves count in |T|.

    Args:
        costs: task -> arm -> cost > 0; infinite, or missing, where the arm does not get there.

    Returns:
        arm -> steps (tau, rho), rising; empty for an arm that solves nothing.

    Example:
        >>> performance_profile({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 3.0}})
        {'x': [(1.0, 1.0)], 'y': [(1.0, 0.5), (2.0, 1.0)]}
    """
    ratios: dict[str, list[float]] = {}
    for arms in costs.values():
        best = min(arms.values(), default=math.inf)
        for arm, cost in arms.items():
            own = ratios.setdefault(arm, [])
            if math.isfinite(cost):
                own.append(cost / best)
    return {
        arm: [(tau, sum(ratio <= tau for ratio in own) / len(costs)) for tau in sorted(set(own))]
        for arm, own in ratios.items()
    }
