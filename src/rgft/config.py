"""The method's settings, checked where they enter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor, nn

from rgft.policies import Policy
from rgft.rules import POSITIVE, SHARE, SWITCH, Rule, check, number, optional, whole
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
        parameter_share: Share of parameter elements that the policy "misa" trains, in (0, 1].
        active: Layers that train at a time, under policies that draw layers.
        temperature: Of the draws by importance, > 0; large values draw uniformly.
        drop: Probability with which the policy "drop-backward" drops a block, in [0, 1).
        floor: Multiplier of components that are not selected, in [0, 1]; 0 freezes them.
        rate: Most that a step of the policy "purchase" may cost, as a share of a full step.
        rate_end: What `rate` becomes by the end of the budget, linearly; None to stay as it is.
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
        bypass: Let the gradient take the skip connections around frozen components, so that
            neither weight nor input gradients are computed in them. What lies below then has
            approximate gradients. Probes are exact.
        frozen_below: Components of smaller depth stay frozen (but for kinds in `always_train`).
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
    parameter_share: float = 0.5
    active: int = 2
    temperature: float = 1.0
    drop: float = 0.5
    floor: float = 0.0
    rate: float = 0.6
    rate_end: float | None = None
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
    bypass: bool = False
    frozen_below: int = 0
    total_steps: int | None = None
    engagement: str = "error"
    history_rows: int = 1000
    seed: int = 0

    @property
    def changed(self) -> frozenset[str]:
        """Names of the settings that differ from their defaults."""
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return frozenset(name for name, value, default in given if value != default)

    def may_train(self, kind: str, depth: int) -> bool:
        """Whether components of this kind and depth are not frozen for good.

        >>> config = Config(frozen_below=3)
        >>> [config.may_train(k, d) for k, d in (("layer", 2), ("layer", 3), ("head", 0))]
        [False, True, True]
        """
        return depth >= self.frozen_below or kind in self.always_train

    def __post_init__(self) -> None:
        check(self, RULES)


def _kinds(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(kind, str) for kind in value)


RULES: dict[str, Rule] = {
    "signal": (
        lambda v: isinstance(v, (str, Signal)) or callable(v),
        "a name, a Signal or a function of Statistics",
    ),
    "p": (lambda v: number(v) and v in NORMS, "1, 2 or inf"),
    "beta": (lambda v: number(v) and 0 <= v < 1, "in [0, 1)"),
    "bias_correction": SWITCH,
    "policy": (lambda v: isinstance(v, (str, Policy)), "a name or a Policy"),
    "alpha": (lambda v: number(v) and 0 <= v < math.inf, "a finite number >= 0"),
    "top": SHARE,
    "parameter_share": SHARE,
    "active": whole(1),
    "temperature": POSITIVE,
    "drop": (lambda v: number(v) and 0 <= v < 1, "in [0, 1)"),
    "floor": (lambda v: number(v) and 0 <= v <= 1, "in [0, 1]"),
    "rate": SHARE,
    "rate_end": optional(SHARE),
    "decay": SHARE,
    "unfrozen_by": SHARE,
    "mean_one": SWITCH,
    "lag": SWITCH,
    "every": whole(1),
    "warmup": whole(0),
    "min_stay": whole(0),
    "probe_every": whole(0),
    "probe_samples": whole(1),
    "bypass": SWITCH,
    "frozen_below": whole(0),
    "always_train": (_kinds, "a tuple of kinds, such as ('head',)"),
    "total_steps": optional(whole(1)),
    "engagement": (lambda v: v in ENGAGEMENT, f"one of {', '.join(ENGAGEMENT)}"),
    "history_rows": whole(2),
    "seed": whole(0),
}
