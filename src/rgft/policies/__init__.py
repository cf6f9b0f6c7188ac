"""Policies: from the error map to learning-rate multipliers, by pure functions.

Write your own as `Policy(lambda situation: ...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """A rule under its name, and the fields of `Config` that are its settings.

    Attributes:
        rule: Takes a situation, and the settings by name.
        settings: Fields of `Config`.
        uses_error: See `Policy`.
        changes: See `Policy`.
    """

    rule: Callable[..., Tensor]
    settings: tuple[str, ...] = ()
    uses_error: bool = True
    changes: bool = True


POLICIES: dict[str, NamedPolicy] = {
    "normalized-max": NamedPolicy(normalized_max, ("alpha",)),
    "normalized-sum": NamedPolicy(normalized_sum, ("alpha",)),
    "rank": NamedPolicy(rank_based, ("alpha",)),
    "proportional": NamedPolicy(proportional),
    "top": NamedPolicy(top_share, ("top", "floor")),
    "bottom": NamedPolicy(bottom_share, ("top", "floor")),
    "inverse": NamedPolicy(inverse, ("alpha",)),
    "uniform": NamedPolicy(uniform, uses_error=False, changes=False),
    "random": NamedPolicy(random_share, ("top", "floor"), uses_error=False),
    "suffix": NamedPolicy(suffix, ("top", "floor"), uses_error=False, changes=False),
    "head-only": NamedPolicy(head_only, uses_error=False, changes=False),
    "layerwise-decay": NamedPolicy(layerwise_decay, ("decay",), uses_error=False, changes=False),
    "gradual-unfreezing": NamedPolicy(gradual_unfreezing, ("unfrozen_by",), uses_error=False),
}
SETTINGS = frozenset(setting for policy in POLICIES.values() for setting in policy.settings)


def find_policy(config: Config) -> Policy:
    """The policy that `config` names, with its settings.

    Raises:
        InputError: Unknown name, a setting that has no effect on this policy, or one that it needs
            is missing.
    """
    if isinstance(config.policy, Policy):
        return config.policy
    if config.policy not in POLICIES:
        allowed = ", ".join(POLICIES)
        raise InputError(f"unknown policy '{config.policy}'; allowed: {allowed}, or a Policy")
    named = POLICIES[config.policy]
    for setting in sorted(SETTINGS.difference(named.settings)):
        if getattr(config, setting) != type(config).__dataclass_fields__[setting].default:
            allowed = ", ".join(named.settings) or "none"
            raise InputError(
                f"{setting} has no effect on the policy '{config.policy}', whose settings are: "
                f"{allowed}; drop it"
            )
    if named.rule is gradual_unfreezing and config.total_steps is None:
        raise InputError(
            "the policy gradual-unfreezing needs total_steps: give Config(total_steps=...)"
        )
    settings = {name: getattr(config, name) for name in named.settings}
    return Policy(partial(named.rule, **settings), named.uses_error, named.changes)
