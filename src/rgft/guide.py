"""The guide: watches an optimizer, keeps the error map, decides plans and has them carried out."""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rgft.components import Component, partition
from rgft.config import Config
from rgft.costs import ComponentCosts, FlopMeter
from rgft.error_map import ErrorMap
from rgft.errors import InputError
from rgft.execution.binding import bind
from rgft.execution.engagement import Engagement
from rgft.execution.freezing import apply_freezing, drop_gradients
from rgft.execution.learning_rates import VirtualGroups
from rgft.execution.measuring import Measuring, Scores
from rgft.execution.plan_bypass import PlanBypass
from rgft.execution.slices import SliceUpdates
from rgft.plan import Plan
from rgft.policies import Situation, find_policy
from rgft.policies.options import hold, mean_one
from rgft.refusals import LAG_REFUSAL, check_together
from rgft.signals import find_signal
from rgft.spending import Spending

Probe = Callable[[int], Iterable[Tensor]]


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
        spending: For the policy "purchase", which must know what steps cost; see `Spending`.
        meter: Counts FLOPs, and has to know what is bypassed; that of `spending` by default.

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
        self.optimizer = _plain(optimizer)
        previous = _GUIDES.get(model, lambda: None)()
        if previous is not None and previous._unfreeze.alive:
            raise InputError("this model already has a guide; call its close() first")
        parts = partition(model, self.config.granularity)
        self.binding = bind(model, self.optimizer, parts)
        self._policy = find_policy(self.config)
        self._probe = probe
        self._generator = torch.Generator().manual_seed(self.config.seed)
        signal = find_signal(self.config.signal, self.config.p)
        check_together(
            self.config,
            self._policy,
            signal,
            probed=probe is not None,
            counted=spending is not None,
        )
        self._measuring = Measuring(self.binding, signal, self._generator)
        adapted = self.binding.components
        self.error_map = ErrorMap(
            adapted,
            self.config.beta,
            bias_correction=self.config.bias_correction,
            device=self.binding.device,
            dtype=self.binding.dtype,
            history_rows=self.config.history_rows,
        )
        self._always = torch.tensor([c.kind in self.config.always_train for c in adapted])
        self._never = torch.tensor([not self._may_train(c) for c in adapted])
        if bool(self._never.all()):
            raise InputError(
                f"frozen_below is {self.config.frozen_below}; allowed: at most "
                f"{max(c.depth for c in adapted)}, the largest depth in this model"
            )
        self._engagement = Engagement(model, self.binding, self.config.engagement)
        self._bypass = None
        if self.config.bypass:
            meter = meter or (None if spending is None else spending.meter)
            self._bypass = PlanBypass(model, parts, self.binding, meter)
        self._groups, self._slices = VirtualGroups(), SliceUpdates(self.binding)
        pieces = self.binding.pieces
        self._revivable = frozenset(p.parameter for p in pieces if not self._never[p.component])
        self._adopt(Plan(adapted, tuple((~self._never).double().tolist())))
        # steps before the first decision
        self._first = self.config.warmup or (self.config.every if self._policy.uses_error else 0)
        self.step = 0
        self.seconds = 0.0
        self._switched = torch.zeros(len(adapted), dtype=torch.long)
        self._warned = 0
        self._told = False
        self._probes_always = (
            self._policy.uses_error
            and signal.source == "gradient"
            and self.config.every * self.config.probe_every == 1
        )
        # An optimizer class whose step calls its parent's runs the hooks of both, one in the other.
        self._stepping: FrameType | None = None
        self._nested = 0
        self._raw = (~self._never).double()
        parameters = tuple(self.binding.parameters.values())
        self._unfreeze: weakref.finalize[Any, Any] = weakref.finalize(
            self, _unfreeze, parameters, self._bypass
        )
        _GUIDES[model] = weakref.ref(self)
        if self.config.total_steps is not None:
            self._warn_if_idle(self.config.total_steps)
        self._start()
        self._handles: list[RemovableHandle] = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_pre_hook(self._groups.abandon),
        ]

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
        return () if self._bypass is None else self._bypass.components

    @property
    def lowest(self) -> int:
        """Least depth of a component that the plan in force trains."""
        parts = zip(self.plan.trained, self.components, strict=True)
        return min(component.depth for trained, component in parts if trained)

    def _may_train(self, component: Component) -> bool:
        """Whether a component is not frozen for good."""
        kept = component.kind in self.config.always_train
        return kept or component.depth >= self.config.frozen_below

    @property
    def probing(self) -> bool:
        """Whether the next step also scores frozen components (it does not update them)."""
        every = self.config.probe_every
        wanted = (
            self._policy.uses_error and every > 0 and self._measuring.signal.source == "gradient"
        )
        resting = any(
            not on
            for on, c in zip(self.plan.trained, self.components, strict=True)
            if self._may_train(c)
        )
        if not wanted or not resting or not self._due(self.step + 1):
            return False
        return ((self.step + 1 - self.config.warmup) // self.config.every) % every == 0

    def close(self) -> None:
        """Let go of the optimizer; every parameter the guide froze requires a gradient again.

        Raises:
            EngagementError: The last plan was not carried out.
        """
        guided = self.step if self._unfreeze.alive else 0
        for handle in self._handles:
            handle.remove()
        self._unfreeze()
        _, _, checks = self.error_map.flush(self._engagement.result())
        try:
            self._engagement.judge(checks)
        finally:
            self._engagement.end()
        if guided and self.config.total_steps is None:
            self._warn_if_idle(guided)
        if guided > self._first and self._bypass is not None and not self._bypass.acted:
            warnings.warn(
                "bypass=True did nothing in this run: no plan froze a component above the lowest "
                "trained one that could be bypassed; drop it, or choose another policy",
                RuntimeWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors, numbers and strings."""
        return {
            "components": [c.name for c in self.binding.components],
            "settings": self._settings(),
            "raw": self._raw.clone(),
            "error_map": self.error_map.state_dict(),
            "lr_scale": list(self.plan.lr_scale),
            "step": self.step,
            "switched": self._switched.clone(),
            "generator": self._generator.get_state(),
            "bypass": None if self._bypass is None else self._bypass.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            InputError: The state is of another model, granularity or settings, or is damaged.
        """
        names = [c.name for c in self.binding.components]
        if list(state.get("components", ())) != names:
            raise InputError(
                f"this state has {len(state.get('components', ()))} components, the guide has "
                f"{len(names)} or others; load it with the model and granularity it was saved with"
            )
        if state["settings"] != self._settings():
            raise InputError(
                f"this state was saved with {state['settings']}, the guide has "
                f"{self._settings()}; load it with the settings it was saved with"
            )
        for part in ("lr_scale", "raw", "switched"):
            if len(state[part]) != len(names):
                raise InputError(
                    f"{part} of this state has {len(state[part])} values for {len(names)} "
                    "components: it is damaged; load another"
                )
        self.error_map.load_state_dict(state["error_map"])
        self._raw = state["raw"].clone()
        self._warned = int(state["error_map"]["skipped"])
        self.step = int(state["step"])
        self._switched = state["switched"].clone()
        self._generator.set_state(state["generator"])
        scale = tuple(float(s) for s in state["lr_scale"])
        if self._bypass is not None and state["bypass"] is not None:
            self._bypass.load_state_dict(state["bypass"])
        self._adopt(replace(self.plan, lr_scale=scale))
        self._apply()
        self._engagement.begin(self.plan)

    def _settings(self) -> str:
        """What the map and the plan mean nothing without."""
        c = self.config
        policy, signal = (x if isinstance(x, str) else "custom" for x in (c.policy, c.signal))
        return (
            f"signal={signal} p={c.p:g} beta={c.beta:g} bias_correction={c.bias_correction} "
            f"policy={policy}"
        )

    def _start(self) -> None:
        """The first plan: all train, unless the policy needs no map to decide."""
        if self._first == 0:
            self._decide(self.error_map.values.double())
        self._apply()
        self._engagement.begin(self.plan)

    def _warn_if_idle(self, steps: int) -> None:
        """Say so if a run of that many steps ends before a plan of the policy's is in force."""
        if self._first == 0 or steps > self._first - (not self.config.lag):
            return
        warnings.warn(
            f"the method does nothing in this run: it first decides after step {self._first}, and "
            f"the run has {steps}, all at the plain learning rate; lower every or warmup, or train "
            "longer",
            RuntimeWarning,
            stacklevel=3,
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is not None and _running(self._stepping):
            self._nested += 1
            return
        self._stepping, self._nested = sys._getframe(1), 0
        started = time.perf_counter()
        given = [*args, *kwargs.values()]
        if any(callable(a) and a is not optimizer for a in given):
            raise InputError(
                "optimizer.step(closure) computes gradients after the guide has looked; "
                "call loss.backward() first and optimizer.step() without a closure"
            )
        scale, found_inf = (
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
        )
        valid = None if found_inf is None else found_inf == 0
        self._take_in(
            self._measuring.before_step(None if scale is None else scale.reciprocal()), valid
        )
        if not self.config.lag and self._due(self.step + 1):
            self._synchronise()
        self._engagement.before_step(optimizer, valid, probing=self.probing)
        drop_gradients(self._scale)
        self._slices.enter(optimizer)
        self._groups.enter(optimizer, self._scale)
        self.seconds += time.perf_counter() - started

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._nested:
            self._nested -= 1
            return
        self._stepping = None
        started = time.perf_counter()
        self._groups.leave(optimizer)
        self._slices.leave(optimizer)
        self._take_in(self._measuring.after_step(), None)
        self.step += 1
        self.error_map.record(self.step, self.plan.lr_scale)
        if self._due(self.step):
            if self._measuring.signal.source == "samples":
                self._take_in(self._probed(), None)
            if self.config.lag:
                self._synchronise()
        self._apply()
        self.seconds += time.perf_counter() - started

    def _take_in(self, scores: Scores | None, valid: Tensor | None) -> None:
        if scores is not None:
            self.error_map.update(scores[0], scores[1], valid)

    def _probed(self) -> Scores:
        """Per-sample scores of all components, frozen ones included."""
        assert self._probe is not None
        self._engagement.paused = True
        if self._bypass is not None:
            self._bypass.follow(self.plan, lifted=True)
        for parameter in self.binding.parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            return self._measuring.from_samples(self._probe(self.config.probe_samples))

    def _due(self, steps: int) -> bool:
        """Whether a decision falls after `steps` steps."""
        since = steps - self.config.warmup
        return steps > 0 and since >= 0 and since % self.config.every == 0

    def _synchronise(self) -> None:
        """The one moment in `config.every` steps at which the host waits for the device."""
        error, skipped, checks = self.error_map.flush(self._engagement.result())
        self._engagement.judge(checks)
        if skipped > self._warned:
            self._warned = skipped
            warnings.warn(
                f"{skipped} of {self.step} steps had a gradient that is not finite; "
                "they were left out of the error map",
                RuntimeWarning,
                stacklevel=2,
            )
        if self._policy.changes or self.step <= self._first:
            before = self.plan.trained
            self._decide(error)
            if self.plan.trained != before:
                self._apply()
                self._engagement.begin(self.plan)

    def _decide(self, error: Tensor) -> None:
        """Ask the policy for multipliers and make them the plan."""
        previous = torch.tensor(self.plan.lr_scale, dtype=torch.float64)
        scale = self._policy.lr_scale(self._situation(error)).to(torch.float64, copy=True)
        if scale.shape != previous.shape or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise InputError(
                f"the policy gave {scale.tolist()[:8]}; it must give one finite number >= 0 for "
                f"each of the {len(previous)} components"
            )
        scale[self._always & (scale == 0)] = 1.0
        scale[self._never] = 0.0
        if self.config.min_stay and self.step:
            scale = hold(scale, self._raw, self.step - self._switched, self.config.min_stay)
        self._raw = scale
        if self.config.mean_one:
            scale = mean_one(scale)
        if not bool((scale > 0).any()):
            raise InputError(
                "the policy freezes every component: nothing would train; the model has no "
                f"component of kind {' or '.join(self.config.always_train) or '-'}, which always "
                "trains"
            )
        freezes = bool(((scale == 0) & ~self._never).any())
        if freezes and not self.config.lag:
            raise InputError(LAG_REFUSAL)
        if freezes and self._policy.uses_error and self._measuring.signal.source == "update":
            raise InputError(
                f"the signal {self.config.signal!r} cannot score frozen components, which could "
                "never come back; choose another signal, or a policy that freezes nothing"
            )
        if freezes and self._probes_always and not self._told:
            self._told = True
            warnings.warn(
                "every=1 with probe_every=1 probes at each step, so that freezing saves no "
                "compute; raise one of them",
                RuntimeWarning,
                stacklevel=2,
            )
        self._switched[(scale > 0) != (previous > 0)] = self.step
        self._adopt(replace(self.plan, lr_scale=tuple(scale.tolist())))

    def _adopt(self, plan: Plan) -> None:
        """Make `plan` the plan; a parameter with several slices steps at their largest rate."""
        self.plan = plan
        of = self.binding.scales_of
        self._scale = {p: max(of(p, plan.lr_scale)) for p in self.binding.parameters.values()}
        self._slices.adopt(plan.lr_scale)

    def _situation(self, error: Tensor) -> Situation:
        return Situation(
            error=error.cpu(),
            components=self.binding.components,
            always=self._always,
            never=self._never,
            step=self.step,
            total_steps=self.config.total_steps,
            generator=self._generator,
            costs=self._costs(),
            progress=None if self.spending is None else self.spending.stage_progress,
        )

    def _costs(self) -> ComponentCosts | None:
        """What steps cost by component, where it is known."""
        if self.spending is None:
            return None
        gates = None if self._bypass is None else self._bypass.gates
        return self.spending.costs(self.binding.components, gates)

    def _apply(self) -> None:
        """Put the plan in force for the next forward pass."""
        self._engagement.paused = self.probing
        apply_freezing(self._scale, self._revivable if self.probing else frozenset())
        if self._bypass is not None:
            self._bypass.follow(self.plan, lifted=self.probing)


def _unfreeze(parameters: tuple[nn.Parameter, ...], bypass: PlanBypass | None) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
    if bypass is not None:
        bypass.close()


def _running(frame: FrameType) -> bool:
    """Whether `frame` is among the callers (it is not, if an error ended it)."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper such as Accelerate's, whose hooks would never be called."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    return inner
