"""Policies: from the error map to learning-rate multipliers, by pure functions.

Write your own as `Policy(lambda situation: ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from rgft.errors import InputError, unknown
from rgft.policies.controls import (
    biases,
    bottom_share,
    gradual_unfreezing,
    head_only,
    inverse,
    layerwise_decay,
    random_share,
    suffix,
    uniform,
)
from rgft.policies.prefix import autofreeze
from rgft.policies.sampled import badam, drop_backward, grass, lisa, misa
from rgft.policies.scaling import normalized_max, normalized_sum, proportional, rank_based
from rgft.policies.selection import bought, top_share
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
        freezes: Whether it freezes, given a floor of 0.
        uses_costs: See `Policy`.
        restarts: See `Policy`.
        turns: See `Policy`.
    """

    rule: Callable[..., Tensor]
    settings: tuple[str, ...] = ()
    uses_error: bool = True
    changes: bool = True
    freezes: bool = False
    uses_costs: bool = False
    restarts: bool = False
    turns: bool = False


POLICIES: dict[str, NamedPolicy] = {
    "normalized-max": NamedPolicy(normalized_max, ("alpha",)),
    "normalized-sum": NamedPolicy(normalized_sum, ("alpha",)),
    "rank": NamedPolicy(rank_based, ("alpha",)),
    "proportional": NamedPolicy(proportional),
    "top": NamedPolicy(top_share, ("top", "floor"), freezes=True),
    "bottom": NamedPolicy(bottom_share, ("top", "floor"), freezes=True),
    "purchase": NamedPolicy(bought, ("rate", "rate_end"), freezes=True, uses_costs=True),
    "inverse": NamedPolicy(inverse, ("alpha",)),
    "uniform": NamedPolicy(uniform, uses_error=False, changes=False),
    "random": NamedPolicy(random_share, ("top", "floor"), uses_error=False, freezes=True),
    "lisa": NamedPolicy(lisa, ("active",), uses_error=False, freezes=True),
    "badam": NamedPolicy(badam, uses_error=False, freezes=True, restarts=True, turns=True),
    "grass": NamedPolicy(grass, ("active", "temperature"), freezes=True),
    "misa": NamedPolicy(misa, ("parameter_share", "temperature"), freezes=True),
    "autofreeze": NamedPolicy(autofreeze, freezes=True),
    "drop-backward": NamedPolicy(drop_backward, ("drop",), uses_error=False, freezes=True),
    "suffix": NamedPolicy(suffix, ("top", "floor"), uses_error=False, changes=False, freezes=True),
    "head-only": NamedPolicy(head_only, uses_error=False, changes=False, freezes=True),
    "biases": NamedPolicy(biases, uses_error=False, changes=False, freezes=True),
    "layerwise-decay": NamedPolicy(layerwise_decay, ("decay",), uses_error=False, changes=False),
    "gradual-unfreezing": NamedPolicy(
        gradual_unfreezing, ("unfrozen_by",), uses_error=False, freezes=True
    ),
}
FREEZING = {  # settings of any policy of a kind
    "min_stay": "policies that freeze, but not in turns",
    "probe_every": "policies that freeze by error",
}
SETTINGS = frozenset([*(s for policy in POLICIES.values() for s in policy.settings), *FREEZING])


def find_policy(config: Config) -> Policy:
    """The policy that `config` names, with its settings.

    Raises:
        InputError: Unknown name, a setting that has no effect on this policy, or one that it needs
            is missing.
    """
    refuse_idle(config, config.changed)
    if isinstance(config.policy, Policy):
        return config.policy
    named = _named(config.policy)
    if named.rule is gradual_unfreezing and config.total_steps is None:
        raise InputError(
            "the policy gradual-unfreezing needs total_steps: give Config(total_steps=...)"
        )
    given = {name: getattr(config, name) for name in named.settings}
    return Policy(
        partial(named.rule, **given),
        uses_error=named.uses_error,
        changes=named.changes,
        freezes=_freezes(named, config),
        uses_costs=named.uses_costs,
        restarts=named.restarts,
        turns=named.turns,
    )


def refuse_idle(config: Config, given: Iterable[str]) -> None:
    """Refuse settings of other policies than the one that `config` names.

    Args:
        config: The settings.
        given: Names of those that someone has given.

    Raises:
        InputError: One has no effect on this policy, or there is no such policy.
    """
    if isinstance(config.policy, Policy):
        if config.policy.turns and "min_stay" in given:
            raise InputError("min_stay has no effect on a policy with turns=True; drop it")
        return
    named = _named(config.policy)
    settings = list(named.settings)
    if _freezes(named, config):  # a turn is `every` steps long, whatever min_stay says
        settings += [] if named.turns else ["min_stay"]
        settings += ["probe_every"] if named.uses_error else []
    for setting in sorted(SETTINGS.intersection(given).difference(settings)):
        others = [name for name, policy in POLICIES.items() if setting in policy.settings]
        whose = FREEZING.get(setting) or ", ".join(others)
        raise InputError(
            f"{setting} has no effect on the policy '{config.policy}', whose settings are: "
            f"{', '.join(settings) or 'none'} ({setting} is for {whose}); drop it"
        )


def _named(policy: str) -> NamedPolicy:
    if policy not in POLICIES:
        more = ", or a Policy; the name of a method goes to --method or rgft.find_method"
        raise unknown("policy", policy, POLICIES, more)
    return POLICIES[policy]


def _freezes(named: NamedPolicy, config: Config) -> bool:
    return named.freezes and config.floor == 0
