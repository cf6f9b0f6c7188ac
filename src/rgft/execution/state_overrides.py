"""Settings of single parameters in bitsandbytes, which knows them by place in the groups."""

from __future__ import annotations

from typing import Any

import torch

from rgft.errors import InputError


def forget_places(optimizer: torch.optim.Optimizer) -> None:
    """Let bitsandbytes find its overrides by parameter alone: virtual groups change the places.

    Raises:
        InputError: An override sets a learning rate, which would undo the multipliers.
    """
    manager: Any = getattr(optimizer, "mng", None)
    if not (hasattr(manager, "index2config") and hasattr(manager, "pid2config")):
        return
    overrides = [*manager.pid2config.values()]
    overrides += [config for _, _, config in manager.module_weight_config_triple]
    if any("lr" in config for config in overrides):
        raise InputError(
            "bitsandbytes overrides the learning rate of a parameter, on which multipliers would "
            "have no effect; drop 'lr' from the override and give the parameter a group of its own"
        )
    manager.index2config.clear()
