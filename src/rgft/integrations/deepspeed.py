"""Learning rates per component under a DeepSpeed engine; it cannot freeze.

ZeRO copies parameters into flat buffers, one for each group that there is when the engine is made,
and takes the gradients for itself. So every component needs groups of its own, by
`rgft.split_groups`, and gradients are asked back for before each step. What is frozen later would
be stepped with a gradient of zeros: momentum and weight decay would move it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rgft.config import Config
from rgft.errors import InputError
from rgft.guide import Guide
from rgft.policies import find_policy

REASON = (
    "DeepSpeed steps frozen parameters with zero gradients, so that momentum and weight decay move "
    "them"
)


class GuidedEngine:
    """A guide for an engine of ZeRO stage 0, 1 or 2; call its `step` in place of the engine's.

    Scores are of full gradients, averaged over processes, before DeepSpeed clips them. The guide's
    state goes into the engine's checkpoint as `client_state`.

    Args:
        engine: Made from an optimizer whose groups were split, without a learning-rate scheduler.
        config: What to do; nothing that freezes.

    Attributes:
        guide: The guide.

    Raises:
        InputError: The plans or the engine are such that rates would not arrive.
    """

    def __init__(self, engine: Any, config: Config | None = None) -> None:
        config = config or Config()
        _refuse(engine, config)
        self._engine = engine
        self._steps = _Steps(engine)
        self.guide = Guide(engine.module, self._steps, config)

    def step(self) -> None:
        """Step the engine; the end of an accumulated batch counts as a step of the guide."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self._steps.refresh()
        held = {p: p.grad for group in self._steps.param_groups for p in group["params"]}
        for parameter in held:
            parameter.grad = _full_gradient(parameter)
        self._steps.held = held
        self._steps.step()


class _Steps(torch.optim.Optimizer):
    """The engine's step as that of an optimizer over the model's own parameters."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.held: dict[nn.Parameter, Tensor | None] = {}  # gradients as the engine left them
        kept = getattr(engine.optimizer, "bit16_groups", None)
        parameters = kept or [group["params"] for group in self._real]
        self._group_of = {p: i for i, group in enumerate(parameters) for p in group}
        groups = zip(self._real, parameters, strict=True)
        super().__init__([{"params": list(p), "lr": real["lr"]} for real, p in groups], {})

    @property
    def _real(self) -> list[dict[str, Any]]:
        """The engine's own groups, which are others after a checkpoint was loaded."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def refresh(self) -> None:
        """Take over the rates that the schedule wrote."""
        for group, real in zip(self.param_groups, self._real, strict=True):
            group["lr"] = real["lr"]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the engine at the rates that are in the groups at present."""
        del closure
        rates: dict[int, set[float]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                rates.setdefault(self._group_of[parameter], set()).add(float(group["lr"]))
        for parameter, gradient in self.held.items():
            parameter.grad = gradient
        if sum(len(group["params"]) for group in self.param_groups) < len(self._group_of):
            raise InputError(
                f"the plan freezes, and {REASON}; use DDP or FSDP2, or a policy's floor"
            )
        if any(len(found) > 1 for found in rates.values()):
            raise InputError(
                "components with different rates share a group of DeepSpeed's; call "
                "rgft.split_groups on the optimizer before deepspeed.initialize"
            )
        groups = self._real
        scheduled = [group["lr"] for group in groups]
        for index, found in rates.items():
            groups[index]["lr"] = found.pop()
        try:
            self._engine.step()
        finally:
            for real, rate in zip(groups, scheduled, strict=True):
                real["lr"] = rate


def _refuse(engine: Any, config: Config) -> None:
    if find_policy(config).freezes or config.frozen_below:
        raise InputError(
            f"plans freeze, and {REASON}; use DDP or FSDP2, or a policy that only scales"
        )
    stage = engine.zero_optimization_stage()
    if stage > 2:
        raise InputError(f"ZeRO stage is {stage}; allowed: 0, 1 and 2 (use FSDP2 to shard weights)")
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        raise InputError(
            "DeepSpeed's fp16 and bf16 are not supported here; leave them out of its config, or "
            "use DDP or FSDP2"
        )
    if engine.lr_scheduler is not None:
        raise InputError(
            "DeepSpeed steps the learning-rate scheduler within its own step, while rates are "
            "multiplied; keep the scheduler to yourself, and step it afterwards"
        )


def _full_gradient(parameter: nn.Parameter) -> Tensor | None:
    from deepspeed.utils import safe_get_full_grad  # noqa: PLC0415 - optional

    gradient: Tensor | None = safe_get_full_grad(parameter)
    return None if gradient is None else gradient.to(parameter.dtype)
