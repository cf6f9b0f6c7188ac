"""Which values a setting may have, and the one line for any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rgft.errors import InputError

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed; what is


def check(settings: object, rules: Mapping[str, Rule]) -> None:
    """Each attribute of `settings` that has a rule must be as it says.

    Raises:
        InputError: One is not.
    """
    for name, (holds, allowed) in rules.items():
        value = getattr(settings, name)
        if not holds(value):
            raise InputError(f"{name} is {value!r}; allowed: {allowed}")


def number(value: object) -> bool:
    """Whether it is a real number, infinite ones included; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(least: int) -> Rule:
    """Whole numbers from `least` on."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return holds, f"a whole number >= {least}"


def optional(rule: Rule) -> Rule:
    """What `rule` allows, or None."""
    holds, allowed = rule
    return lambda value: value is None or holds(value), allowed


POSITIVE: Rule = (lambda v: number(v) and 0 < v < math.inf, "a number > 0")
SHARE: Rule = (lambda v: number(v) and 0 < v <= 1, "in (0, 1]")
SWITCH: Rule = (lambda v: isinstance(v, bool), "True or False")
