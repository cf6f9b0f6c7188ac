"""Learning rates per component, without the optimizer's groups or the scheduler noticing."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgft.errors import InputError
from rgft.execution.relative_rates import chooses_its_rate
from rgft.execution.state_overrides import forget_places

Group = dict[str, Any]

# optimizers, by name of their class, to which a plan can give no rates that differ, and why
ONE_RATE = {
    "Prodigy": "estimates one learning rate for all parameters",
    "Rprop": "looks at the learning rate in its first step alone",
}


@dataclass(frozen=True, slots=True)
class Virtual:
    """A part of a real group with one multiplier; as it entered the step, to see what was written.

    The dicts are filled anew at each step: thousands of new ones would have Python collect garbage.
    A tensor in the group is copied, since one that counts steps in place would count each part.
    """

    real: Group
    multiplier: float
    parameters: list[nn.Parameter]
    group: Group = field(default_factory=dict)
    entered: Group = field(default_factory=dict)

    def fill(self) -> Group:
        """The group for this step."""
        rate = _scaled(self.real, self.multiplier)
        own = {
            key: value.clone()
            for key, value in self.real.items()
            if isinstance(value, Tensor) and key != "lr"
        }
        for copy in (self.group, self.entered):
            copy.clear()
            copy.update(self.real, **own)
            copy.update(params=self.parameters, lr=rate)
        return self.group

    def written(self) -> Iterator[tuple[str, Any]]:
        """What the step put into the group, or changed in place."""
        for key, value in self.group.items():
            replaced = key not in self.entered or value is not self.entered[key]
            if replaced or (isinstance(value, Tensor) and key != "lr" and value._version):
                yield key, value


class VirtualGroups:
    """Parameter groups, one per multiplier, that exist only while the optimizer steps.

    The optimizer's own groups are never resized: its state, its checkpoints and the scheduler see
    the groups the user made. Frozen parameters are in no virtual group, so that not even an
    optimizer that treats a missing gradient as zero can move them.
    """

    def __init__(self) -> None:
        self._real: list[Group] | None = None  # while virtual ones stand in for them
        self._virtual: list[Virtual] = []
        self._scale: Mapping[nn.Parameter, float] = {}
        self._divided: list[tuple[Group, list[nn.Parameter]]] = []
        self._fresh: set[nn.Parameter] = set()
        self.keeps_state = False  # whether the optimizer wrote to its groups in the last step

    def enter(self, optimizer: torch.optim.Optimizer, scale: Mapping[nn.Parameter, float]) -> None:
        """Swap the virtual groups in. Parameters not in `scale` keep their learning rate."""
        self.abandon(optimizer)
        real = optimizer.param_groups
        fresh = _without_momentum(optimizer)
        if scale is not self._scale or fresh != self._fresh or not self._still_divides(real):
            check_rates(optimizer, scale.values())
            self._fresh = fresh
            self._divide(real, scale)
        forget_places(optimizer)
        optimizer.param_groups = [virtual.fill() for virtual in self._virtual]
        self._real = real

    def abandon(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the real groups back after a step that raised an error half-way."""
        if self._real is not None:
            optimizer.param_groups = self._real
            self._real = None

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the real groups back.

        Raises:
            InputError: The optimizer keeps state in its groups that depends on the learning rate,
                which virtual groups cannot carry.
        """
        self.abandon(optimizer)
        written: dict[tuple[int, str], Any] = {}
        for virtual in self._virtual:
            real = virtual.real
            for key, value in virtual.written():
                first = written.setdefault((id(real), key), value)
                if key in ("lr", "params") or not _same(first, value):
                    raise InputError(
                        f"{type(optimizer).__name__} writes '{key}' to its parameter groups at "
                        "each step, so that learning rates per component cannot be applied to it; "
                        "call rgft.split_groups directly after making it, or use an optimizer that "
                        "keeps its state per parameter, such as AdamW"
                    )
                real[key] = value
        self.keeps_state = bool(written)

    def _divide(self, groups: list[Group], scale: Mapping[nn.Parameter, float]) -> None:
        if not {parameter for group in groups for parameter in group["params"]} >= scale.keys():
            raise InputError(
                "the optimizer has other parameters than when the guide was made, as after "
                "fully_shard or accelerator.prepare (FSDP2); make the Guide after them"
            )
        self._scale, self._virtual = scale, []
        self._divided = [(real, list(real["params"])) for real in groups]
        for real, parameters in self._divided:
            alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for parameter in parameters:
                key = (scale.get(parameter, 1.0), parameter in self._fresh)
                alike.setdefault(key, []).append(parameter)
            parts = [Virtual(real, m, held) for (m, _), held in alike.items() if m > 0]
            # a group of frozen parameters goes on counting steps, as it would in a plain loop
            self._virtual += parts or [Virtual(real, 1.0, [])]

    def _still_divides(self, groups: list[Group]) -> bool:
        """Whether the groups are those that were divided: loading a state replaces them."""
        return len(groups) == len(self._divided) and all(
            real is known
            and len(real["params"]) == len(parameters)
            and all(map(operator.is_, real["params"], parameters))
            for real, (known, parameters) in zip(groups, self._divided, strict=True)
        )


def _without_momentum(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """Parameters that fused SGD cannot step together with others: it takes all buffers or none."""
    if not isinstance(optimizer, torch.optim.SGD):
        return set()
    return {
        parameter
        for group in optimizer.param_groups
        if group["fused"] and group["momentum"]
        for parameter in group["params"]
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is None
    }


def check_rates(optimizer: torch.optim.Optimizer, multipliers: Iterable[float]) -> None:
    """Refuse multipliers that `optimizer` cannot have an effect of.

    Raises:
        InputError: There is one that is neither 0 nor 1, and the optimizer takes no other.
    """
    reason = next(
        (ONE_RATE[c.__name__] for c in type(optimizer).__mro__ if c.__name__ in ONE_RATE), None
    )
    if reason is not None and not set(multipliers) <= {0.0, 1.0}:
        raise InputError(
            f"{type(optimizer).__name__} {reason}, so that multipliers other than 0 and 1 cannot "
            "act; choose a policy that only freezes, such as 'top', or another optimizer"
        )


def _scaled(group: Group, multiplier: float) -> Any:
    if chooses_its_rate(group):
        return group["lr"]  # `RelativeUpdates` scales what the step did
    if group.get("lr") is None:
        raise InputError(
            "the optimizer has no learning rate of its own (lr is None) for multipliers to act on; "
            "give it one"
        )
    return group["lr"] if multiplier == 1.0 else group["lr"] * multiplier


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return bool(left == right)
