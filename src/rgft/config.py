"""The method's settings, checked where they enter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rgft.errors import InputError
from rgft.policies import Policy
from rgft.signals import NORMS, Signal, Statistics

ENGAGEMENT = ("error", "warn", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    r"""What a `Guide` does. The defaults are the published method with normalized learning rates.

    Attributes:
        granularity: How the model is split: "layer", "block", "head", "lora", "parameter", a
            regular expression, or a function of (name, parameter).
        signal: A name in `rgft.SIGNALS`, or a function of `Statistics`.
        p: Norm of the signal "grad-norm": 1, 2 or inf.
        beta: Smoothing of the error map, in [0, 1).
        bias_correction: Correct the map for its start at 0.
        policy: A name in `rgft.POLICIES`, or a `Policy`.
        alpha: Strength of the scaling policies, >= 0.
        top: Share of components that selection policies train, in (0, 1].
        floor: Multiplier of components that are not selected, in [0, 1]; 0 freezes them.
        decay: Base of layer-wise learning-rate decay, in (0, 1].
        unfrozen_by: Share of the run after which gradual unfreezing has opened all, in (0, 1].
        mean_one: Divide the multipliers by their mean over trained components.
        lag: Use the map as it stood before the current batch (True), or with it (the published
            formula; only for policies that do not freeze).
        every: Optimizer steps between decisions. The device is waited for once per decision.
        warmup: Steps with all components trained before the first decision.
        min_stay: Fewest steps a component stays frozen or trained.
        probe_every: Decisions between probes, the steps in which frozen components have their
            gradient computed (not applied) so that they can come back; 0 for never.
        probe_samples: Samples in the probe batch of per-sample signals.
        always_train: Kinds of components that are never frozen.
        total_steps: Optimizer steps of the run; needed by gradual unfreezing.
        engagement: What happens when a plan is found not to be carried out: "error", "warn", "off".
        history_rows: Most steps of the map's history that are kept.
        seed: Of the method's own randomness.
    """

    granularity: str | Callable[[str, nn.Parameter], str] = "layer"
    signal: str | Signal | Callable[[Statistics], Tensor] = "grad-norm"
    p: float = 2.0
    beta: float = 0.9
    bias_correction: bool = False
    policy: str | Policy = "normalized-max"
    alpha: float = 1.0
    top: float = 0.5
    floor: float = 0.0
    decay: float = 0.9
    unfrozen_by: float = 0.5
    mean_one: bool = False
    lag: bool = True
    every: int = 10
    warmup: int = 0
    min_stay: int = 0
    probe_every: int = 1
    probe_samples: int = 16
    always_train: tuple[str, ...] = ("head",)
    total_steps: int | None = None
    engagement: str = "error"
    history_rows: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _require("p", self.p, self.p in NORMS, "1, 2 or inf")
        _require("beta", self.beta, 0 <= self.beta < 1, "in [0, 1)")
        _require("alpha", self.alpha, 0 <= self.alpha < math.inf, "a finite number >= 0")
        for name in ("top", "decay", "unfrozen_by"):
            value = getattr(self, name)
            _require(name, value, 0 < value <= 1, "in (0, 1]")
        _require("floor", self.floor, 0 <= self.floor <= 1, "in [0, 1]")
        for name in ("every", "probe_samples"):
            value = getattr(self, name)
            _require(name, value, _whole(value) and value >= 1, "a whole number >= 1")
        for name in ("warmup", "min_stay", "probe_every"):
            value = getattr(self, name)
            _require(name, value, _whole(value) and value >= 0, "a whole number >= 0")
        steps = self.total_steps
        _require(
            "total_steps",
            steps,
            steps is None or (_whole(steps) and steps >= 1),
            "a whole number >= 1",
        )
        _require(
            "history_rows",
            self.history_rows,
            _whole(self.history_rows) and self.history_rows >= 2,
            "a whole number >= 2",
        )
        _require(
            "engagement",
            self.engagement,
            self.engagement in ENGAGEMENT,
            f"one of {', '.join(ENGAGEMENT)}",
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}; allowed: {allowed}")
