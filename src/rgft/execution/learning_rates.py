"""Learning rates per component, without the optimizer's groups or the scheduler noticing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rgft.errors import InputError

Group = dict[str, Any]


class VirtualGroups:
    """Parameter groups, one per multiplier, that exist only while the optimizer steps.

    The optimizer's own groups are never resized: its state, its checkpoints and the scheduler see
    the groups the user made. Frozen parameters are in no virtual group, so that not even an
    optimizer that treats a missing gradient as zero can move them.
    """

    def __init__(self) -> None:
        self._real: list[Group] = []
        self._virtual: list[tuple[Group, Group, Group]] = []

    def enter(self, optimizer: torch.optim.Optimizer, scale: Mapping[nn.Parameter, float]) -> None:
        """Swap the virtual groups in. Parameters not in `scale` keep their learning rate."""
        self.abandon(optimizer)
        self._real = optimizer.param_groups
        self._virtual = []
        for real in self._real:
            by_scale: dict[float, list[nn.Parameter]] = {}
            for parameter in real["params"]:
                by_scale.setdefault(scale.get(parameter, 1.0), []).append(parameter)
            for multiplier, parameters in by_scale.items():
                if multiplier > 0:
                    group = {**real, "params": parameters, "lr": _scaled(real, multiplier)}
                    self._virtual.append((real, group, dict(group)))
        optimizer.param_groups = [group for _, group, _ in self._virtual]

    def abandon(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the real groups back after a step that raised an error half-way."""
        if self._virtual:
            optimizer.param_groups = self._real
            self._virtual = []

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the real groups back.

        Raises:
            InputError: The optimizer keeps state in its groups that depends on the learning rate,
                which virtual groups cannot carry.
        """
        optimizer.param_groups = self._real
        written: dict[tuple[int, str], Any] = {}
        for real, group, entered in self._virtual:
            for key, value in group.items():
                if key in entered and value is entered[key]:
                    continue
                first = written.setdefault((id(real), key), value)
                if key in ("lr", "params") or not _same(first, value):
                    raise InputError(
                        f"{type(optimizer).__name__} writes '{key}' to its parameter groups at "
                        "each step, so that learning rates per component cannot be applied to it; "
                        "use an optimizer that keeps its state per parameter, such as AdamW"
                    )
                real[key] = value
        self._virtual = []


def _scaled(group: Group, multiplier: float) -> Any:
    if group.get("lr") is None:
        raise InputError(
            "the optimizer has no learning rate of its own (lr is None) for multipliers to act on; "
            "give it one"
        )
    return group["lr"] if multiplier == 1.0 else group["lr"] * multiplier


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)
