"""Whether a guide can go on from the saved state of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rgft.components import Component
from rgft.config import Config
from rgft.errors import InputError, warn
from rgft.plan import Plan
from rgft.policies import Policy
from rgft.signals import Signal

FOLLOWING = ("total_steps", "engagement")  # from the loop; from how the run is watched
BY_COMPONENT = ("lr_scale", "raw", "switched")  # parts with one value a component


def decisive_settings(config: Config) -> str:
    """What the map and the plan mean nothing without."""
    c = config
    policy, signal = (x if isinstance(x, str) else "custom" for x in (c.policy, c.signal))
    return (
        f"signal={signal} p={c.p:g} beta={c.beta:g} bias_correction={c.bias_correction} "
        f"policy={policy}"
    )


def all_settings(config: Config) -> dict[str, str]:
    """All settings as texts; functions and objects of the user's by their names."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    shown = {k: getattr(v, "__qualname__", v) for k, v in values.items()}
    shown |= {k: type(v).__name__ for k, v in shown.items() if isinstance(v, (Signal, Policy))}
    return {name: str(value) for name, value in shown.items()}


def what_is_shared(config: Config, plan: Plan) -> str:
    """What every process must have alike, in one line."""
    settings = " ".join(f"{name}={value}" for name, value in all_settings(config).items())
    return f"{settings} for {sum(c.numel for c in plan.components)} parameters: {plan.lr_scale}"


def check_state(state: Mapping[str, Any], components: Sequence[Component], config: Config) -> None:
    """Refuse the state of a guide that had other components or settings.

    Args:
        state: From `Guide.state_dict`.
        components: Of the guide that is to go on from it.
        config: Its settings.

    Raises:
        InputError: The state is of another model, granularity or settings, or is damaged.
    """
    names = [c.name for c in components]
    if list(state.get("components", ())) != names:
        raise InputError(
            f"this state has {len(state.get('components', ()))} components, the guide has "
            f"{len(names)} or others; load it with the model and granularity it was saved with"
        )
    settings = decisive_settings(config)
    if state["settings"] != settings:
        raise InputError(
            f"this state was saved with {state['settings']}, the guide has "
            f"{settings}; load it with the settings it was saved with"
        )
    _warn_of_others(state.get("all_settings", {}), all_settings(config))
    for part in BY_COMPONENT:
        if len(state[part]) != len(names):
            raise InputError(
                f"{part} of this state has {len(state[part])} values for {len(names)} "
                "components: it is damaged; load another"
            )


def _warn_of_others(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Say which settings are others than those that the state was saved with."""
    changed = [n for n in now if n not in FOLLOWING and before.get(n, now[n]) != now[n]]
    if changed:
        told = ", ".join(f"{name} is {now[name]} and was {before[name]}" for name in changed)
        warn(
            f"settings changed since this state was saved: {told}; the run goes on with the new "
            "ones, and is not the one that was stopped"
        )
