"""Putting a plan in force: what has a gradient, and at which learning rate it steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rgft.errors import InputError
from rgft.execution.binding import Binding
from rgft.execution.freezing import apply_freezing, drop_gradients
from rgft.execution.learning_rates import VirtualGroups
from rgft.execution.plan_bypass import PlanBypass
from rgft.execution.relative_rates import RelativeUpdates
from rgft.execution.slices import SliceUpdates
from rgft.plan import Plan


class Enforcement:
    """Carries out one plan at a time.

    Args:
        binding: What of the model can be adapted.
        plan: The first plan.
        never: Components that no plan trains, bool `[K]`.
        bypass: Takes gradients around what plans freeze; None if that is not wanted.

    Attributes:
        plan: The plan in force.
        bypass: As given.
    """

    def __init__(
        self, binding: Binding, plan: Plan, never: Tensor, bypass: PlanBypass | None
    ) -> None:
        self.bypass = bypass
        self._parameters = tuple(binding.parameters.values())
        self._scales_of = binding.scales_of
        self._never: list[bool] = never.tolist()
        self._revivable = frozenset(p.parameter for p in binding.pieces if not never[p.component])
        self._groups, self._slices = VirtualGroups(), SliceUpdates(binding)
        self._relative = RelativeUpdates()
        self._wanted = dict.fromkeys(self._parameters, True)
        self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        """Make `plan` the plan; a parameter with several slices steps at their largest rate."""
        self.plan = plan
        self._trying = False
        self._set_scales(plan.lr_scale)

    def restart(self, optimizer: torch.optim.Optimizer, always: Tensor) -> None:
        """Have the optimizer forget its state of all parameters but those that always train."""
        kept = always.tolist()
        for parameter in self._parameters:
            if not any(self._scales_of(parameter, kept)):
                optimizer.state.pop(parameter, None)

    def _set_scales(self, lr_scale: Sequence[float]) -> None:
        self._scale = {p: max(self._scales_of(p, lr_scale)) for p in self._parameters}
        self._slices.adopt(lr_scale)

    def _multipliers(self, trying: bool) -> list[float]:
        """Those of the plan; while trying, 1 for each component that is frozen for now alone."""
        planned = zip(self._never, self.plan.lr_scale, strict=True)
        return [1.0 if trying and not never and m == 0 else m for never, m in planned]

    def apply(self, *, probing: bool, trying: bool = False) -> None:
        """Put the plan in force for the next forward pass.

        Args:
            probing: Whether frozen components have a gradient too, to be scored and then dropped.
            trying: Whether the next step trains them as well, at the scheduled rate.
        """
        if trying != self._trying:
            self._trying = trying
            self._set_scales(self._multipliers(trying))
        probed = self._revivable if probing else frozenset()
        self._wanted = {p: m > 0 or p in probed for p, m in self._scale.items()}
        apply_freezing(self._scale, probed)
        if self.bypass is not None:
            self.bypass.follow(self.plan, lifted=probing)

    def keep(self, model: nn.Module, inputs: Any) -> None:
        """Before a forward pass, undo what something else did to `requires_grad`."""
        del model, inputs
        if torch.is_grad_enabled():
            self._keep()

    def keep_in_backward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """After a forward pass, have `keep` done again when its backward pass begins.

        What is recomputed there has to be what was computed, and in between DPO has switched the
        adapters off and on again for its reference.
        """
        del model, inputs
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._keep())  # type: ignore[no-untyped-call]

    def _keep(self) -> None:
        for parameter, wanted in self._wanted.items():
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Everything requires a gradient in this block, without being used."""
        before, wanted = [p.requires_grad for p in self._parameters], self._wanted
        self._require_gradients()
        yield
        self._wanted = wanted
        for parameter, required in zip(self._parameters, before, strict=True):
            parameter.requires_grad_(required)

    def lift(self) -> None:
        """Let everything have a gradient, frozen for good or not, until the next `apply`."""
        if self.bypass is not None:
            self.bypass.follow(self.plan, lifted=True)
        self._require_gradients()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Swap in the learning rates of the plan."""
        drop_gradients(self._scale)
        self._slices.enter(optimizer)
        self._relative.enter(optimizer, self._scale)
        self._groups.enter(optimizer, self._scale)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its own groups back."""
        self._groups.leave(optimizer)
        if self._groups.keeps_state and self._slices.acts:
            raise InputError(
                f"{type(optimizer).__name__} keeps state in its parameter groups, so that slices "
                "of one parameter, such as attention heads, cannot be updated apart; choose the "
                "granularity 'layer', 'block' or 'parameter'"
            )
        self._relative.leave()
        self._slices.leave(optimizer)

    def abandon_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its own groups back after a step that raised an error half-way."""
        self._groups.abandon(optimizer)

    def end(self) -> None:
        """Carry out nothing any more."""
        self._require_gradients()
        if self.bypass is not None:
            self.bypass.close()

    def _require_gradients(self) -> None:
        self._wanted = dict.fromkeys(self._parameters, True)
        for parameter in self._parameters:
            parameter.requires_grad_(True)
