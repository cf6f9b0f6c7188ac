"""A suite: which arms, on which tasks and models, with which budgets, rates and seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from rgft.bench.reading import check_keys, mapping, read_yaml, sequence, text
from rgft.errors import InputError, unknown
from rgft.methods import METHODS, find_method
from rgft.rules import number
from rgft.spec import RunSpec
from rgft.spending import parse_budget
from rgft.tasks import TASKS

KEYS = (
    *("name", "models", "tasks", "arms", "budgets", "seeds", "rates", "sweep", "rows", "options"),
)
AXES = ("model", "task", "data", "seed", "lr", "budget", "max_train_rows", "extend")
OPTIONS = tuple(f.name for f in fields(RunSpec) if f.name not in AXES)
TEXTS = tuple(
    name
    for name, kind in get_type_hints(RunSpec).items()
    if name in OPTIONS and kind in (str, str | None)
)
IN_SUITE = {
    **{name: name for name in OPTIONS},
    **{"set": "settings", "lr": "rates", "budget": "budgets", "seed": "seeds"},
    **{"model": "models", "task": "tasks", "data": "data", "max_train_rows": "rows"},
}
SWEEPS = ("first-seed", "all-seeds")
OWN = "own"  # the learning rate that a method brings
NEEDS_BUDGET = ("group_by_length", "skip")

Budget = float | str  # a share of full fine-tuning, 1 for no budget at all; a time; "auto"


@dataclass(frozen=True, slots=True)
class Place:
    """A model or a task: its name in records, and the options of `rgft train` that say it."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """A method with options, and its sweep.

    Attributes:
        name: Its name in records.
        options: Of `rgft train`, those of the arm that it extends included.
        rates: Learning rates of its sweep; None for the method's own.
        budgets: Its budgets.
        tasks: Names of the tasks that it runs on; None for all.
        extends: The arm from which it differs in a few options; None for none.
        changes: Those options.
    """

    name: str
    options: Mapping[str, Any]
    rates: tuple[float | None, ...]
    budgets: tuple[Budget, ...]
    tasks: tuple[str, ...] | None
    extends: str | None
    changes: Mapping[str, Any]

    def runs_on(self, task: Place) -> bool:
        """Whether it is run on the task."""
        return self.tasks is None or task.name in self.tasks


@dataclass(frozen=True, slots=True)
class Suite:
    """What a suite's file says, checked.

    Attributes:
        name: Its name.
        models: Models.
        tasks: Tasks.
        arms: Arms.
        seeds: Seeds; the first is that of a sweep over the first seed.
        sweep: "first-seed" or "all-seeds": at which seeds all rates run.
        extend: Python files with methods and tasks of the user's own.
    """

    name: str
    models: tuple[Place, ...]
    tasks: tuple[Place, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    sweep: str
    extend: tuple[str, ...] = ()


def load_suite(path: Path, extend: tuple[str, ...] = ()) -> Suite:
    """Reads a suite; folders in it are relative to its file.

    Args:
        path: A YAML file.
        extend: Python files whose methods and tasks have been added.

    Raises:
        InputError: Something in it is not known or not allowed; one line says what and where.
    """
    values = read_yaml(path)
    for key in values:
        if key in OPTIONS:
            raise InputError(f"{path}: {key} is an option of runs; put it into options, or an arm")
    check_keys(str(path), values, KEYS)
    for key in ("tasks", "arms", "seeds"):
        if key not in values:
            raise InputError(f"{path} has no {key}; a suite needs tasks, arms and seeds")
    base = {**_rows(values), **_options("options", mapping("options", values.get("options")))}
    budgets = _budgets("budgets", values.get("budgets", [1.0]))
    rates = _rates("rates", values.get("rates", [OWN]))
    sweep = values.get("sweep", SWEEPS[0])
    if sweep not in SWEEPS:
        raise InputError(f"sweep is {sweep!r}; allowed: {', '.join(SWEEPS)}")
    models = sequence("models", values.get("models", ["minilm"]))
    tasks = _unique("task", [_task(path.parent, base, v) for v in _list(values, "tasks")])
    return Suite(
        name=text("name", values.get("name", path.stem)),
        models=_unique("model", [_model(path.parent, value) for value in models]),
        tasks=tasks,
        arms=_arms(mapping("arms", values["arms"]), tasks, budgets, rates),
        seeds=tuple(_seed(value) for value in _list(values, "seeds")),
        sweep=sweep,
        extend=tuple(os.path.abspath(file) for file in extend),
    )


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    return sequence(key, values[key])


def _unique(what: str, places: list[Place]) -> tuple[Place, ...]:
    names = [place.name for place in places]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two {what}s are called {name!r}; give one of them another name")
    return tuple(places)


def _rows(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_train_rows": values["rows"]} if values.get("rows") is not None else {}


def _options(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `rgft train` that are not an axis of the suite."""
    check_keys(where, values, OPTIONS)
    typed = {name: _plain_number(value) for name, value in values.items()}
    for name in TEXTS:
        if values.get(name) is not None:
            typed[name] = text(f"{where}: {name}", values[name])
    columns = values.get("text_columns")
    if columns is not None:
        names = sequence(f"{where}: text_columns", _listed(columns))
        typed["text_columns"] = tuple(text(f"{where}: text_columns", name) for name in names)
    if "settings" in typed:
        settings = mapping(f"{where}: settings", values["settings"])
        typed["settings"] = {name: _plain_number(value) for name, value in settings.items()}
    return typed


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def in_suite(message: str) -> str:
    """A message of `rgft train` with its options as a suite has them.

    >>> in_suite("give --no-dropout, a lower --lr, --model one of texts, or another --label-column")
    'give dropout: false, lower rates, models of texts, or another label_column'
    """
    for option, key in IN_SUITE.items():
        spelled = rf"--{option.replace('_', '-')}\b(?!-)"
        if key not in (option, "settings"):  # the suite has several
            message = re.sub(rf"\ban? ((?:\w+ )?){spelled}", rf"\1{key}", message)
            message = re.sub(rf"\banother {spelled}", f"other {key}", message)
            message = re.sub(rf"{spelled} one\b", key, message)
        message = re.sub(spelled.replace("--", "--no-", 1), f"{key}: false", message)
        message = re.sub(spelled, key, message)
    return message


def _plain_number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4, without a dot, for a text.

    >>> _plain_number("1e-4"), _plain_number("bfloat16"), _plain_number("inf")
    (0.0001, 'bfloat16', 'inf')
    """
    if isinstance(value, str) and value[:1].isdigit():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _model(folder: Path, value: Any) -> Place:
    if isinstance(value, dict):
        check_keys("models", value, ("name", "path"))
        name, where = text("models: name", value.get("name")), text("path", value.get("path"))
    else:
        name = where = text("models", value)
    return Place(name, {"model": _folder(folder, where) or where})


def _task(folder: Path, base: Mapping[str, Any], value: Any) -> Place:
    values = {"name": value} if isinstance(value, str) else mapping("tasks", value)
    name = text("tasks: name", values.get("name"))
    check_keys(f"task {name}", values, ("name", "data", "rows", *OPTIONS))
    rest = {key: item for key, item in values.items() if key not in ("name", "data", "rows")}
    options = {**base, **_rows(values), **_options(f"task {name}", rest)}
    if "data" not in values and name in TASKS:
        return Place(name, {**options, "task": name})
    where = _folder(folder, text(f"task {name}: data", values.get("data", name)))
    if where is None and "data" in values:
        raise InputError(f"task {name}: there is no folder {folder / values['data']}; name one")
    if where is None:
        raise unknown(
            "task",
            name,
            TASKS,
            f", one of a file given with --extend, or a folder in that of the suite ({folder})",
        )
    return Place(name, {**options, "data": where})


def _folder(base: Path, name: str) -> str | None:
    """The absolute path of a folder beside the suite; None where there is none."""
    path = base / name
    return os.path.abspath(path) if path.is_dir() else None


def _arms(
    values: Mapping[str, Any],
    tasks: tuple[Place, ...],
    budgets: tuple[Budget, ...],
    rates: tuple[float | None, ...],
) -> tuple[Arm, ...]:
    arms: dict[str, Arm] = {}
    for name, content in values.items():
        given = dict(mapping(f"arm {name}", content))
        check_keys(f"arm {name}", given, ("extends", "rates", "budgets", "tasks", *OPTIONS))
        parent = given.pop("extends", None)
        if parent is not None and parent not in arms:
            below = ", or one that stands above it: move it up" if parent in values else ""
            raise InputError(f"arm {name}: {unknown('arm to extend', str(parent), arms, below)}")
        start = None if parent is None else arms[parent]
        own_rates = _rates(f"arm {name}: rates", given.pop("rates", None))
        own_budgets = _budgets(f"arm {name}: budgets", given.pop("budgets", None))
        own_tasks = _some_tasks(f"arm {name}: tasks", given.pop("tasks", None), tasks)
        changes = _options(f"arm {name}", given)
        options = {} if start is None else dict(start.options)
        settings = {**options.get("settings", {}), **changes.get("settings", {})}
        options |= changes
        if settings:
            options["settings"] = settings
        method = find_method(str(options.setdefault("method", name)))
        if "method" not in changes and name in METHODS and method is not METHODS[name]:
            raise InputError(
                f"arm {name} extends {parent}, whose method is {options['method']}; add method: "
                f"{name}, or give it a name that is no method's"
            )
        arms[name] = Arm(
            name=name,
            options=options,
            rates=own_rates or (rates if start is None else start.rates),
            budgets=own_budgets or (budgets if start is None else start.budgets),
            tasks=own_tasks or (None if start is None else start.tasks),
            extends=parent,
            changes=changes,
        )
    if not arms:
        raise InputError("arms is empty; allowed: a name and options for each, e.g. 'full: {}'")
    return tuple(arms.values())


def _some_tasks(where: str, values: Any, tasks: tuple[Place, ...]) -> tuple[str, ...] | None:
    if values is None:
        return None
    names = [task.name for task in tasks]
    for value in sequence(where, values):
        if value not in names:
            raise InputError(f"{where}: {unknown('task', str(value), names)}")
    return tuple(values)


def _rates(where: str, values: Any) -> tuple[float | None, ...]:
    if values is None:
        return ()
    rates = []
    for value in sequence(where, [values] if values == OWN else values):
        rate = _plain_number(value)
        if rate != OWN and not (number(rate) and 0 < rate < 1e9):
            raise InputError(f"{where} has {value!r}; allowed: numbers > 0, or {OWN}")
        rates.append(None if rate == OWN else float(rate))
    return tuple(rates)


def _budgets(where: str, values: Any) -> tuple[Budget, ...]:
    if values is None:
        return ()
    return tuple(_budget(where, value) for value in sequence(where, values))


def _budget(where: str, value: Any) -> Budget:
    try:
        parsed = parse_budget(str(value))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return value if parsed.auto or parsed.share is None else float(parsed.share)


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise InputError(f"seeds has {value!r}; allowed: whole numbers, 0 to 2^32 - 1")
    return value
