"""Policies: from the error map to learning-rate multipliers, by pure functions.

Write your own as `Policy(lambda situation: ...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rgft.errors import InputError
from rgft.policies.controls import (
    bottom_share,
    gradual_unfreezing,
    head_only,
    inverse,
    layerwise_decay,
    random_share,
    suffix,
    uniform,
)
from rgft.policies.scaling import normalized_max, normalized_sum, proportional, rank_based
from rgft.policies.selection import top_share
from rgft.policies.situation import Policy, Situation

if TYPE_CHECKING:
    from rgft.config import Config

__all__ = ["POLICIES", "Policy", "Situation", "find_policy"]


def _gradual(config: Config) -> Policy:
    if config.total_steps is None:
        raise InputError(
            "the policy gradual-unfreezing needs total_steps: give Config(total_steps=...)"
        )
    rule = partial(gradual_unfreezing, unfrozen_by=config.unfrozen_by)
    return Policy(rule, uses_error=False)


POLICIES: dict[str, Callable[[Config], Policy]] = {
    "normalized-max": lambda c: Policy(partial(normalized_max, alpha=c.alpha)),
    "normalized-sum": lambda c: Policy(partial(normalized_sum, alpha=c.alpha)),
    "rank": lambda c: Policy(partial(rank_based, alpha=c.alpha)),
    "proportional": lambda c: Policy(proportional),
    "top": lambda c: Policy(partial(top_share, top=c.top, floor=c.floor)),
    "bottom": lambda c: Policy(partial(bottom_share, top=c.top, floor=c.floor)),
    "inverse": lambda c: Policy(partial(inverse, alpha=c.alpha)),
    "uniform": lambda c: Policy(uniform, uses_error=False, changes=False),
    "random": lambda c: Policy(partial(random_share, top=c.top, floor=c.floor), uses_error=False),
    "suffix": lambda c: Policy(
        partial(suffix, top=c.top, floor=c.floor), uses_error=False, changes=False
    ),
    "head-only": lambda c: Policy(head_only, uses_error=False, changes=False),
    "layerwise-decay": lambda c: Policy(
        partial(layerwise_decay, decay=c.decay), uses_error=False, changes=False
    ),
    "gradual-unfreezing": _gradual,
}


def find_policy(config: Config) -> Policy:
    """The policy that `config` names, with its settings.

    Raises:
        InputError: Unknown name, or a setting that this policy needs is missing.
    """
    if isinstance(config.policy, Policy):
        return config.policy
    if config.policy not in POLICIES:
        allowed = ", ".join(POLICIES)
        raise InputError(f"unknown policy '{config.policy}'; allowed: {allowed}, or a Policy")
    return POLICIES[config.policy](config)
