"""Settings that do not go together: refused before anything is done."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rgft.config import Config
from rgft.errors import InputError
from rgft.execution.learning_rates import check_rates
from rgft.policies import POLICIES, Policy
from rgft.signals import Signal

LAG_REFUSAL = "lag=False cannot freeze (backward has already run); use lag=True"


def check_together(  # noqa: PLR0913 - all that is looked at
    config: Config,
    policy: Policy,
    signal: Signal,
    *,
    probed: bool,
    counted: bool,
    budgeted: bool,
    sharded: bool,
) -> None:
    """Refuse what lacks something that it needs.

    Args:
        config: The settings.
        policy: The one that they name.
        signal: The one that they name.
        probed: Whether there is a probe.
        counted: Whether FLOPs are counted.
        budgeted: Whether there is a budget that they are counted against.
        sharded: Whether processes hold parts of the parameters.

    Raises:
        InputError: Something is missing, or has no effect.
    """
    refuse_unmeasured(config, signal, config.changed)
    if signal.source == "samples" and not probed:
        raise InputError(
            f"the signal {config.signal!r} needs per-sample losses: give Guide(..., probe=...)"
        )
    if sharded and signal.source == "samples":
        raise InputError(
            f"the signal {config.signal!r} needs per-sample gradients, which sharded parameters "
            "(FSDP2) do not get; choose a gradient signal, such as 'grad-norm', or use DDP"
        )
    if sharded and config.bypass:
        raise InputError(
            "bypass=True runs a copy of the model to find its branches, and a sharded model "
            "(FSDP2) cannot be copied; drop it, or use DDP"
        )
    if policy.uses_costs and not counted:
        raise InputError(
            f"the policy {config.policy!r} needs to know what steps cost: give "
            "Guide(..., meter=FlopMeter(model)), or spending=..."
        )
    if config.rate_end is not None and not budgeted:
        raise InputError(
            "rate_end is what rate becomes by the end of a budget, and there is none: give "
            "Guide(..., spending=...), or --budget to rgft train"
        )
    if policy.freezes and not config.lag:
        raise InputError(LAG_REFUSAL)
    if signal.source != "gradient" and not config.lag:
        raise InputError(
            f"lag=False needs a signal known before the step, {config.signal!r} is not; "
            "use lag=True or a gradient signal such as 'grad-norm'"
        )
    if config.bypass and not policy.freezes:
        raise InputError(
            "bypass=True has no effect, since the policy freezes nothing; drop it, or choose one "
            "that freezes, such as 'top' (a Policy of your own says so by freezes=True)"
        )


def check_optimizer(optimizer: torch.optim.Optimizer, config: Config) -> None:
    """Refuse a policy whose multipliers `optimizer` would ignore; other plans as they come.

    Raises:
        InputError: The optimizer has one rate for all, and the policy is one that scales.
    """
    named = POLICIES.get(config.policy) if isinstance(config.policy, str) else None
    if named is not None and not named.freezes and config.policy != "uniform":
        check_rates(optimizer, [2.0])


def refuse_unmeasured(config: Config, signal: Signal, given: Iterable[str]) -> None:
    """Refuse settings of other signals than that of `config`.

    Args:
        config: The settings.
        signal: The one that they name.
        given: Names of those that someone has given.

    Raises:
        InputError: One has no effect on this signal.
    """
    unused = {
        "p": config.signal != "grad-norm",
        "probe_samples": signal.source != "samples",
    }
    for name, idle in unused.items():
        if idle and name in given:
            raise InputError(f"{name} has no effect on the signal {config.signal!r}; drop it")
