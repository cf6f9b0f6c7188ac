"""Settings: what is allowed is taken, all else is refused in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rgft import Config, InputError, Policy, Signal
from rgft.policies.controls import uniform
from rgft.signals import rms

NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "p": ([1, 2, 1.0, 2.0, math.inf], [3, 0, -1, 1.5]),
    "beta": ([0, 0.0, 0.9, 0.999999], [1, 1.0, -0.1, 2, math.inf]),
    "alpha": ([0, 1, 1e6], [-1, -1e-9, math.inf]),
    "top": ([1, 0.5, 1e-6], [0, -0.5, 1.1, math.inf]),
    "parameter_share": ([1, 0.03, 1e-6], [0, -0.5, 1.1, math.inf]),
    "floor": ([0, 1, 0.1], [-0.1, 1.1]),
    "rate": ([1, 0.5], [0, -1, 1.5]),
    "decay": ([1, 0.5], [0, -1, 1.5]),
    "temperature": ([0.1, 2], [0, -1, math.inf]),
    "drop": ([0, 0.5], [-0.1, 1]),
    "unfrozen_by": ([1, 0.25], [0, -1, 1.5]),
}
WHOLE: dict[str, tuple[list[Any], list[Any]]] = {
    "active": ([1, 4], [0, -1]),
    "every": ([1, 1000], [0, -1]),
    "probe_samples": ([1, 64], [0, -1]),
    "warmup": ([0, 10], [-1]),
    "frozen_below": ([0, 3], [-1]),
    "min_stay": ([0, 10], [-1]),
    "probe_every": ([0, 10], [-1]),
    "history_rows": ([2, 5000], [0, 1, -1]),
    "seed": ([0, 2**31], [-1]),
    "total_steps": ([1, None], [0, -1]),
}
OTHER: dict[str, tuple[list[Any], list[Any]]] = {
    "engagement": (["error", "warn", "off"], ["on", "", None, True, 1]),
    "bias_correction": ([True, False], ["false", 0, 1, None]),
    "bypass": ([True, False], ["false", 0, 1, None]),
    "mean_one": ([True, False], ["false", 0, 1, None]),
    "lag": ([True, False], ["false", 0, 1, None]),
    "rate_end": ([None, 1, 0.1], [0, -1, 1.5, True, "1", math.nan]),
    "always_train": ([(), ("head", "norm")], ["head", None, 3, (1,)]),
    "signal": (["rms", rms, Signal(rms)], [None, 3, ["rms"]]),
    "policy": (["top", Policy(uniform)], [None, 3, uniform, ["top"]]),
}
NOT_NUMBERS = (math.nan, "1", "half", None, True, [1], 1j)
NOT_WHOLE = (math.nan, "1", 1.5, 1.0, True, [1])

GOOD = [(n, v) for table in (NUMBERS, WHOLE, OTHER) for n, (good, _) in table.items() for v in good]
BAD = [(n, v) for table in (NUMBERS, WHOLE, OTHER) for n, (_, bad) in table.items() for v in bad]
BAD += [(name, value) for name in NUMBERS for value in NOT_NUMBERS]
BAD += [(name, value) for name in WHOLE for value in NOT_WHOLE]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_takes(name: str, value: Any) -> None:
    assert getattr(Config(**{name: value}), name) is value


@pytest.mark.parametrize(("name", "value"), BAD)
def test_refuses_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        Config(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; allowed: ")
    assert "\n" not in message


def test_every_setting_is_covered() -> None:
    covered = {*NUMBERS, *WHOLE, *OTHER, "granularity"}  # the last is checked by partition
    assert covered == set(Config.__slots__)


def test_the_defaults_are_the_published_method() -> None:
    config = Config()
    assert (config.signal, config.p, config.policy, config.alpha) == (
        "grad-norm",
        2.0,
        "normalized-max",
        1.0,
    )
    assert not config.bias_correction
    assert not config.mean_one
