"""A user's settings, put on top of a method's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from rgft.adapters import ADAPTERS, Adapter
from rgft.config import Config
from rgft.errors import InputError, unknown
from rgft.execution.galore import PROJECTION_RULES, Projection
from rgft.methods import Method
from rgft.policies import refuse_idle
from rgft.refusals import refuse_unmeasured
from rgft.signals import find_signal
from rgft.spec import RunSpec

FROM_ELSEWHERE = ("granularity", "total_steps", "seed")  # options of their own, or filled in
OPTIONAL = ("rate_end",)  # numbers that may be left out
PROJECTED = {f"galore_{field}": field for field in PROJECTION_RULES}
ADDED = tuple(dict.fromkeys(a.setting for a in ADAPTERS.values() if a.setting))
DEFAULTS = {f.name: f.default for f in fields(Config) if f.name not in FROM_ELSEWHERE}


class Chosen(NamedTuple):
    """A method's settings with the user's."""

    config: Config
    adapter: Adapter | None  # what is added to the model
    size: int | None  # of that
    projection: Projection | None


def method_config(spec: RunSpec, method: Method) -> Chosen:
    """The method's settings with the user's.

    Raises:
        InputError: A setting is unknown, of the wrong type, out of range, or has no effect.
    """
    settings = dict(spec.settings)
    adapter = None if method.adapter is None else ADAPTERS[method.adapter]
    value = None if adapter is None else adapter.default
    for name in ADDED:
        given = settings.pop(name, None)
        if given is None:
            continue
        if adapter is None or name != adapter.setting:
            raise InputError(f"{name} has no effect on the method '{spec.method}'; drop it")
        if type(given) is not int or given < 1:
            raise InputError(f"{name} is {given!r}; allowed: a whole number >= 1")
        value = given
    projection = _projection(settings, method.projection, spec.method)
    more = list(PROJECTED) if projection else []
    if adapter is not None and adapter.setting is not None:
        more.append(adapter.setting)
    changed = typed(settings, more)
    if spec.granularity is not None:
        changed["granularity"] = spec.granularity
    config = replace(method.config, seed=spec.seed, **changed)
    refuse_idle(config, changed)
    refuse_unmeasured(config, find_signal(config.signal, config.p), changed)
    return Chosen(config, adapter, value, projection)


def _projection(
    settings: dict[str, Any], projection: Projection | None, method: str
) -> Projection | None:
    """The method's with what `settings` say of it, which is taken out of them."""
    for name, field in PROJECTED.items():
        if name not in settings:
            continue
        value = settings.pop(name)
        if projection is None:
            raise InputError(f"{name} has no effect on the method '{method}'; drop it")
        holds, allowed = PROJECTION_RULES[field]
        if not holds(value):
            raise InputError(f"{name} is {value!r}; allowed: {allowed}")
        projection = replace(projection, **{field: value})
    return projection


def typed(settings: Mapping[str, Any], more: Iterable[str] = ()) -> dict[str, Any]:
    """Settings with the types that `Config` has.

    Args:
        settings: What was given.
        more: Other settings of the method, for the error.

    Raises:
        InputError: A setting is unknown, or its value is of another type.

    >>> typed({"p": "inf", "always_train": "head,embedding"})
    {'p': inf, 'always_train': ('head', 'embedding')}
    """
    for name in settings:
        if name not in DEFAULTS:
            raise unknown("setting", name, [*more, *DEFAULTS])
    return {name: _typed(name, value) for name, value in settings.items()}


def _typed(name: str, value: Any) -> Any:
    default = DEFAULTS[name]
    if isinstance(default, tuple):
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names):
            return tuple(n.strip() for n in names if n.strip())
        raise InputError(f"{name} is {value!r}; allowed: names with commas between them")
    if value is None and name in OPTIONAL:
        return None
    if isinstance(default, float) or name in OPTIONAL:
        number = math.inf if value == "inf" else value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return float(number)
        raise InputError(f"{name} is {value!r}; allowed: a number")
    if type(value) is not type(default):
        allowed = {bool: "true or false", int: "a whole number", str: "a name"}[type(default)]
        raise InputError(f"{name} is {value!r}; allowed: {allowed}")
    return value
