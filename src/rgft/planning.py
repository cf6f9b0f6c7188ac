"""From the error map to the next plan: what the policy wants, within what the settings demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rgft.components import Component
from rgft.config import Config
from rgft.costs import ComponentCosts, LatestCosts
from rgft.errors import InputError, warn
from rgft.plan import Plan
from rgft.policies import Policy, Situation
from rgft.policies.options import hold, mean_one
from rgft.processes import Processes
from rgft.refusals import LAG_REFUSAL
from rgft.signals import Signal
from rgft.spending import Spending
from rgft.timetable import Timetable


class Planning:
    """Decides one plan after the other.

    Args:
        components: Those that can be adapted, in the order of the map.
        config: The settings.
        policy: The one that they name.
        signal: What the map consists of.
        generator: The policy's source of randomness.
        spending: Where it is counted.
        costs: Of steps, where they are counted.

    Attributes:
        always: Components that are never frozen, bool `[K]`.
        never: Components that stay frozen, bool `[K]`.
        timetable: When decisions fall.
        processes: Those that train the model together, if there are several; the first decides.

    Raises:
        InputError: The settings freeze every component.
    """

    def __init__(  # noqa: PLR0913 - what a decision depends on
        self,
        components: tuple[Component, ...],
        config: Config,
        *,
        policy: Policy,
        signal: Signal,
        generator: torch.Generator,
        spending: Spending | None,
        costs: LatestCosts | None,
    ) -> None:
        self.processes: Processes | None = None
        self._components, self._config = components, config
        self._policy, self._signal = policy, signal
        self._generator, self._spending, self._costs = generator, spending, costs
        self.timetable = Timetable(
            config, uses_error=policy.uses_error, revives=signal.source != "samples"
        )
        self.always = torch.tensor([c.kind in config.always_train for c in components])
        self.never = torch.tensor([not config.may_train(c.kind, c.depth) for c in components])
        if bool(self.never.all()):
            raise InputError(
                f"frozen_below is {config.frozen_below}; allowed: at most "
                f"{max(c.depth for c in components)}, the largest depth in this model"
            )
        self._may_train = (~self.never).tolist()
        self._switched = torch.zeros(len(components), dtype=torch.long)
        self._raw = (~self.never).double()
        self._seen: Tensor | None = None  # the map at the last decision
        self._told = False

    def first(self) -> Plan:
        """All that may train does, until the first decision."""
        return Plan(self._components, tuple((~self.never).double().tolist()))

    def rests(self, plan: Plan) -> bool:
        """Whether `plan` freezes something that a later one may train."""
        return any(may and not on for may, on in zip(self._may_train, plan.trained, strict=True))

    def warn_if_short(self, steps: int) -> None:
        """Say so if a run of that many steps ends before each layer has had its turn."""
        if not self._policy.turns:
            return
        free = zip(self._components, (~(self.always | self.never)).tolist(), strict=True)
        layers = sum(may and component.kind == "layer" for component, may in free)
        every, turned = self._config.every, steps - self.timetable.first
        missed = layers - max(0, -(-turned // every))
        if missed <= 0:
            return
        lower = f"set every to at most {turned // layers}, or " if turned >= layers else ""
        warn(
            f"{missed} of {layers} layers get no turn to train in this run: a cycle takes "
            f"{layers * every} steps ({every} for each), and the run has {max(0, turned)}; "
            f"{lower}train longer"
        )

    def decide(
        self, error: Tensor, plan: Plan, step: int, gates: Mapping[str, list[int]] | None
    ) -> Plan:
        """The plan that follows `plan`.

        Args:
            error: The error map, `[K]`.
            plan: The one in force.
            step: Optimizer steps done so far.
            gates: Who opens the modules that may be bypassed; see `PlanBypass.gates`.

        Raises:
            InputError: The policy gave no multipliers, or those that cannot be carried out.
        """
        scale = self._wanted(error, plan, step, gates)
        if self.processes is not None:
            scale = self.processes.of_first(scale)
        scale[self.always & (scale == 0)] = 1.0
        scale[self.never] = 0.0
        if self._config.min_stay and step:
            scale = hold(scale, self._raw, step - self._switched, self._config.min_stay)
        self._raw = scale
        if self._config.mean_one:
            scale = mean_one(scale)
        self._check(scale)
        previous = torch.tensor(plan.lr_scale, dtype=torch.float64)
        self._switched[(scale > 0) != (previous > 0)] = step
        return Plan(self._components, tuple(scale.tolist()))

    def costs(self, gates: Mapping[str, list[int]] | None) -> ComponentCosts | None:
        """What steps cost by component, where it is known."""
        return None if self._costs is None else self._costs.of(self._components, gates)

    def state_dict(self) -> dict[str, Tensor | None]:
        """What the next decisions depend on beside the map and the plan."""
        return {"raw": self._raw.clone(), "switched": self._switched.clone(), "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._raw = state["raw"].clone()
        self._switched = state["switched"].clone()
        self._seen = state["seen"]

    def _wanted(
        self, error: Tensor, plan: Plan, step: int, gates: Mapping[str, list[int]] | None
    ) -> Tensor:
        """The policy's multipliers."""
        if self._spending is not None:
            self._spending.settle()
        situation = Situation(
            error=error.cpu(),
            components=self._components,
            always=self.always,
            never=self.never,
            step=step,
            total_steps=self._config.total_steps,
            generator=self._generator,
            trained=torch.tensor(plan.trained),
            decision=self.timetable.decision(step),
            previous_error=self._seen,
            costs=self.costs(gates),
            progress=None if self._spending is None else self._spending.stage_progress,
        )
        scale = self._policy.lr_scale(situation).to(torch.float64, copy=True)
        self._seen = situation.error.clone()
        right = scale.shape == (len(plan.lr_scale),)
        if not right or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise InputError(
                f"the policy gave {scale.tolist()[:8]}; it must give one finite number >= 0 for "
                f"each of the {len(plan.lr_scale)} components"
            )
        return scale

    def _check(self, scale: Tensor) -> None:
        """Refuse multipliers that cannot be carried out; say where freezing saves nothing."""
        if not bool((scale > 0).any()):
            wanted = " or ".join(self._config.always_train) or "-"
            kinds = ", ".join(dict.fromkeys(component.kind for component in self._components))
            raise InputError(
                "nothing would train: the policy freezes every component but those of kind "
                f"{wanted}, and this model has none (one that writes texts has no new head); it "
                f"has {kinds}: set always_train to one of these, or choose another method"
            )
        if not bool(((scale == 0) & ~self.never).any()):
            return
        if not self._config.lag:
            raise InputError(LAG_REFUSAL)
        if self.timetable.always_probes and not self._told:
            self._told = True
            warn(
                "every=1 with probe_every=1 probes at each step, so that freezing saves no "
                "compute; raise one of them"
            )
