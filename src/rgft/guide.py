"""The guide: watches an optimizer, keeps the error map, decides plans and has them carried out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from rgft.components import Component, partition
from rgft.config import Config
from rgft.costs import FlopMeter, LatestCosts
from rgft.errors import InputError, warn
from rgft.execution.binding import bind
from rgft.execution.checkpointing import keep_truncation, restore_truncation
from rgft.execution.compilation import watch_compiling
from rgft.execution.enforcement import Enforcement
from rgft.execution.engagement import Engagement
from rgft.execution.parallel import (
    check_wrapper,
    find_processes,
    many,
    refuse_engines,
    settle_types,
    when_wrapped,
)
from rgft.execution.plan_bypass import PlanBypass
from rgft.execution.reduction import reduce_trained_only
from rgft.execution.step_hooks import plain_optimizer, watch_steps
from rgft.plan import Plan
from rgft.planning import Planning
from rgft.policies import find_policy
from rgft.processes import Processes
from rgft.refusals import check_optimizer, check_together
from rgft.resumption import all_settings, check_state, decisive_settings, what_is_shared
from rgft.scoring import Probe, Scoring
from rgft.signals import find_signal
from rgft.spending import Spending
from rgft.structure.layers import without_replicas

_GUIDES: WeakKeyDictionary[nn.Module, weakref.ref[Guide]] = WeakKeyDictionary()


class Guide:
    r"""Residual-guided fine-tuning of `model` by `optimizer`.

    At each optimizer step the guide scores every component, smooths the scores into the error map,
    and scales the learning rates by the plan in force. Every `config.every` steps it decides the
    next plan. It works through hooks on the optimizer: the loop stays as it is. A run that ends
    before the first of these decisions is in force gives a `RuntimeWarning`.

    .. math:: \theta_k \leftarrow \theta_k - \eta_0 f(E_k, \{E_j\}) (g_k + \lambda \theta_k)

    Args:
        model: Any module.
        optimizer: Built over `model`'s parameters. Its groups and the scheduler stay untouched.
        config: What to do.
        probe: For the signals "fisher" and "signal-to-noise": given n, yields the losses of n
            samples one by one, each a scalar with a gradient.
        spending: What is spent of a budget; see `Spending`.
        meter: Counts FLOPs, and has to know what is bypassed; that of `spending` by default. The
            policy "purchase" needs one.

    Attributes:
        error_map: The map, with its history.
        plan: The plan in force.
        step: Optimizer steps seen so far.
        seconds: Time spent in the guide itself.

    Raises:
        InputError: A setting that cannot be used with this model or optimizer.
        EngagementError: From `optimizer.step()`, when a plan was found not to be carried out.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> guide = Guide(model, optimizer, Config(every=1))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(2, 4)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    >>> max(guide.plan.lr_scale), guide.step
    (2.0, 3)
    """

    def __init__(  # noqa: PLR0913 - all but two have defaults
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config | None = None,
        *,
        probe: Probe | None = None,
        spending: Spending | None = None,
        meter: FlopMeter | None = None,
    ) -> None:
        self.config = config or Config()
        self.spending = spending
        self.optimizer = plain_optimizer(optimizer)
        refuse_engines(model, optimizer)
        wrapper, model = model, without_replicas(model)
        previous = _GUIDES.get(model, lambda: None)()
        if previous is not None and previous._release.alive:
            raise InputError("this model already has a guide; call its close() first")
        parts = partition(model, self.config.granularity)
        self.binding = bind(model, self.optimizer, parts)
        self._processes = find_processes(wrapper, self.binding.parameters.values())
        self._generator = torch.Generator().manual_seed(self.config.seed)
        meter = meter or (None if spending is None else spending.meter)
        self._decide_how(probe, meter)
        self._engagement = Engagement(model, self.binding, self.config.engagement, self.optimizer)
        bypass = None
        if self.config.bypass:
            bypass = PlanBypass(model, parts, self.binding, meter)
        self._enforcement = Enforcement(
            self.binding, self._planning.first(), self._planning.never, bypass
        )
        self.step = 0
        self.seconds = 0.0
        settle_types(model)
        if isinstance(wrapper, DistributedDataParallel) and self._processes is not None:
            self._join(wrapper, self._processes)
        elif self._processes is not None:
            self._agree_with(self._processes)
        self._release: weakref.finalize[Any, Any] = weakref.finalize(self, self._enforcement.end)
        _GUIDES[model] = weakref.ref(self)
        if self.config.total_steps is not None:
            self._timetable.warn_if_idle(self.config.total_steps)
            if spending is None:
                self._planning.warn_if_short(self.config.total_steps)
        restore_truncation(model, freezes=self.freezes)
        self._start()
        self._handles: list[RemovableHandle] = [
            *(watch_compiling(model, self.optimizer) if self.freezes else ()),
            *watch_steps(self.optimizer, self._before_step, self._after_step),
            *keep_truncation(model),
            self.optimizer.register_state_dict_pre_hook(self._enforcement.abandon_step),
        ]
        if any(hasattr(module, "adapter_layer_names") for module in model.modules()):
            # peft makes all adapters require gradients again when they are switched
            self._handles.append(model.register_forward_pre_hook(self._enforcement.keep))
            self._handles.append(model.register_forward_hook(self._enforcement.keep_in_backward))
        if self._processes is None and many():
            self._handles.append(when_wrapped(model, self._wrapped))

    def _decide_how(self, probe: Probe | None, meter: FlopMeter | None) -> None:
        """Set up what goes from gradients to plans."""
        config, generator, spending = self.config, self._generator, self.spending
        self._policy = find_policy(config)
        signal = find_signal(config.signal, config.p)
        check_together(
            config,
            self._policy,
            signal,
            probed=probe is not None,
            counted=meter is not None,
            budgeted=spending is not None,
            sharded=self.binding.sharded,
        )
        check_optimizer(self.optimizer, config)
        self._scoring = Scoring(self.binding, config, signal, generator, probe, self._processes)
        self.error_map = self._scoring.error_map
        self._planning = Planning(
            self.components,
            config,
            policy=self._policy,
            signal=signal,
            generator=generator,
            spending=spending,
            costs=None if meter is None else LatestCosts(meter),
        )
        self._timetable = self._planning.timetable

    @property
    def freezes(self) -> bool:
        """Whether plans may freeze anything."""
        return self._policy.freezes or self.config.frozen_below > 0

    def _wrapped(self, wrapper: DistributedDataParallel) -> None:
        """The model turns out to be trained by several processes."""
        with self._enforcement.suspended():
            self._join(wrapper, Processes(wrapper.process_group))

    def _join(self, wrapper: DistributedDataParallel, processes: Processes) -> None:
        """Train with processes that have the whole model each."""
        check_wrapper(wrapper, freezes=self.freezes)
        if self.freezes:
            reduce_trained_only(wrapper)
        self._agree_with(processes)

    def _agree_with(self, processes: Processes) -> None:
        """Decide, and judge, with other processes; they must have been set up alike."""
        processes.refuse_different("plan or settings", what_is_shared(self.config, self.plan))
        self._processes = processes
        self._planning.processes = self._engagement.processes = processes
        if self.spending is not None:
            self.spending.share(processes)

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._enforcement.plan

    @property
    def components(self) -> tuple[Component, ...]:
        """Those that the optimizer updates, in the order of the map and the plan."""
        return self.binding.components

    @property
    def active(self) -> frozenset[str]:
        """Names of the parameters whose gradient the next backward pass computes."""
        parameters = self.binding.parameters
        return frozenset(name for name, p in parameters.items() if p.requires_grad)

    @property
    def bypassed(self) -> tuple[str, ...]:
        """Names of the components around which the gradient takes the skip connection.

        Those of them that lie below all that trains have no gradient in any case.
        """
        bypass = self._enforcement.bypass
        return () if bypass is None else bypass.components

    @property
    def lowest(self) -> int:
        """Least depth of a component that the plan in force trains."""
        parts = zip(self.plan.trained, self.components, strict=True)
        return min(component.depth for trained, component in parts if trained)

    @property
    def trying(self) -> bool:
        """Whether the next step trains all components, since only a step can score them."""
        return self.probing and self._scoring.signal.source == "update"

    @property
    def probing(self) -> bool:
        """Whether the next step also scores frozen components.

        It updates them only if it is `trying`.
        """
        return self._timetable.probes(self.step + 1) and self._planning.rests(self.plan)

    @property
    def idle(self) -> bool:
        """Whether no plan of the policy's has been in force for a step so far."""
        return self._timetable.idle(self.step)

    def close(self) -> None:
        """Let go of the optimizer; every parameter the guide froze requires a gradient again.

        Raises:
            EngagementError: The last plan was not carried out.
        """
        guided = self.step if self._release.alive else 0
        for handle in self._handles:
            handle.remove()
        self._release()
        _, _, checks = self.error_map.flush(self._engagement.result())
        try:
            self._engagement.judge(checks)
        finally:
            self._engagement.end()
        unforeseen = self.config.total_steps is None
        if guided and unforeseen:
            self._timetable.warn_if_idle(guided)
        if guided and (unforeseen if self.spending is None else self.spending.finished):
            self._planning.warn_if_short(guided)
        bypass = self._enforcement.bypass
        if guided > self._timetable.first and bypass is not None and not bypass.acted:
            warn(
                "bypass=True did nothing in this run: no plan froze a component above the lowest "
                "trained one that could be bypassed; drop it, or choose another policy"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors, numbers and strings."""
        bypass = self._enforcement.bypass
        return {
            "components": [c.name for c in self.binding.components],
            "settings": decisive_settings(self.config),
            "all_settings": all_settings(self.config),
            "error_map": self.error_map.state_dict(),
            "lr_scale": list(self.plan.lr_scale),
            "step": self.step,
            "generator": self._generator.get_state(),
            "bypass": None if bypass is None else bypass.state_dict(),
            **self._planning.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, with a warning where other settings changed.

        Raises:
            InputError: The state is of another model, granularity or settings, or is damaged.
        """
        check_state(state, self.components, self.config)
        self._scoring.load_state_dict(state["error_map"])
        self._planning.load_state_dict(state)
        self.step = int(state["step"])
        self._generator.set_state(state["generator"])
        scale = tuple(float(s) for s in state["lr_scale"])
        bypass = self._enforcement.bypass
        if bypass is not None and state["bypass"] is not None:
            bypass.load_state_dict(state["bypass"])
        self._enforcement.adopt(replace(self.plan, lr_scale=scale))
        self._apply()
        self._engagement.begin(self.plan)

    def _start(self) -> None:
        """The first plan: all train, unless the policy needs no map to decide."""
        if self._timetable.first == 0:
            self._decide(self.error_map.values.double())
        self._apply()
        self._engagement.begin(self.plan)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, inverse_scale: Tensor | None, valid: Tensor | None
    ) -> None:
        started = time.perf_counter()
        self._scoring.before_step(inverse_scale, valid)
        if not self.config.lag and self._timetable.due(self.step + 1):
            self._synchronise()
        if self.trying:
            self._engagement.hold()
        self._engagement.before_step(optimizer, valid, probing=self.probing)
        self._enforcement.before_step(optimizer)
        self.seconds += time.perf_counter() - started

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        started = time.perf_counter()
        self._enforcement.after_step(optimizer)
        self._scoring.after_step()
        self.step += 1
        self.error_map.record(self.step, self.plan.lr_scale)
        if self._timetable.due(self.step):
            if self._scoring.signal.source == "samples":
                self._probe()
            if self.config.lag:
                self._synchronise()
        self._apply()
        self.seconds += time.perf_counter() - started

    def _probe(self) -> None:
        """Score all components, frozen ones included."""
        self._engagement.paused = True
        self._enforcement.lift()
        self._scoring.probe()

    def _synchronise(self) -> None:
        """The one moment in `config.every` steps at which the host waits for the device."""
        error, skipped, checks = self.error_map.flush(self._engagement.result())
        self._engagement.judge(checks)
        self._scoring.warn_if_skipped(skipped, self.step)
        if self._policy.changes or self.step <= self._timetable.first:
            before = self.plan.trained
            self._decide(error)
            if self.plan.trained != before:
                self._apply()
                self._engagement.begin(self.plan)

    def _decide(self, error: Tensor) -> None:
        """Make the next plan the plan."""
        bypass = self._enforcement.bypass
        gates = None if bypass is None else bypass.gates
        self._enforcement.adopt(self._planning.decide(error, self.plan, self.step, gates))
        if self._policy.restarts:
            self._enforcement.restart(self.optimizer, self._planning.always)

    def _apply(self) -> None:
        """Put the plan in force for the next forward pass."""
        probing = self.probing
        self._engagement.paused = probing
        self._enforcement.apply(probing=probing, trying=self.trying)
