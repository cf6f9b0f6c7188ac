"""Labels as they come in files, turned into classes 0..n-1 or into floats."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rgft.errors import InputError
from rgft.tasks.tables import Table, one_line
from rgft.tasks.task import Kind

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
# more classes than this, with fewer than two rows each on average, are a mistake
_MANY_CLASSES = 20


@dataclass(frozen=True, slots=True)
class LabelScheme:
    """What the labels of the training split are.

    Attributes:
        type: bool, int or str for classes, float for regression.
        values: The classes in order; empty for regression.
    """

    type: type[bool] | type[int] | type[str] | type[float]
    values: tuple[bool | int | str, ...]

    @property
    def kind(self) -> Kind:
        """Regression where labels are floats."""
        return "regression" if self.type is float else "classification"

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each class; empty for regression."""
        return tuple(str(value) for value in self.values)


def is_number_text(text: str) -> bool:
    """Whether `text` is a finite decimal number as written in files.

    >>> is_number_text("-1.5e3"), is_number_text("1_000"), is_number_text("nan")
    (True, False, False)
    """
    return _NUMBER.fullmatch(text.strip()) is not None


def infer_scheme(table: Table, column: str) -> LabelScheme:
    """Read off the training labels whether they are classes, and which, or numbers.

    Raises:
        InputError: They are missing, of mixed or unusable types, not finite, or all the same.
    """
    labels = _present(table, column)
    found = _type_of(table, column, labels)
    if found is float:
        numbers = {_number(table, column, row, label) for row, label in enumerate(labels, start=1)}
        scheme = LabelScheme(float, ())
        distinct = len(numbers)
    else:
        values: set[Any] = {_as_type(label, found) for label in labels}
        scheme = LabelScheme(found, tuple(sorted(values)))
        distinct = len(values)
    if distinct < 2:
        raise InputError(
            f"{table.source}: every label in column {column!r} is {one_line(repr(labels[0]), 60)}; "
            f"training needs at least two different labels"
        )
    if scheme.values and distinct > max(_MANY_CLASSES, len(labels) // 2):
        raise InputError(
            f"{table.source}: column {column!r} has {distinct} different labels in {len(labels)} "
            f"rows, too many for classes; write numbers as floats (3.0) for regression, or name "
            f"another column with --label-column"
        )
    return scheme


def encode_labels(table: Table, column: str, scheme: LabelScheme) -> list[int] | list[float]:
    """The labels of a split as ints 0..n-1, or as floats for regression, [rows].

    Raises:
        InputError: A label is missing, not finite, or one that training does not have.
    """
    labels = _present(table, column)
    if scheme.type is float:
        return [_number(table, column, row, label) for row, label in enumerate(labels, start=1)]
    # the type is part of the key, for True == 1 == 1.0 in Python
    index = {(scheme.type, value): at for at, value in enumerate(scheme.values)}
    encoded = []
    for row, label in enumerate(labels, start=1):
        value = _as_type(label, scheme.type) if table.written else label
        at = index.get((type(value), value))  # type: ignore[arg-type]
        if at is None:
            raise InputError(
                f"{table.source}: label {one_line(repr(label), 60)} in row {row} of column "
                f"{column!r} does not occur in training, which has {one_line(scheme.values)}; "
                f"correct it, or add rows with it to the training file"
            )
        encoded.append(at)
    return encoded


def _present(table: Table, column: str) -> Sequence[object]:
    """The labels, none of them missing; as written in CSV, without the space around them."""
    labels = table.columns[column]
    missing = [row for row, label in enumerate(labels, start=1) if _is_blank(label)]
    if missing:
        raise InputError(
            f"{table.source}: {len(missing)} of {len(labels)} rows have no label in column "
            f"{column!r}, the first is row {missing[0]}; fill them in or remove them"
        )
    return [str(label).strip() for label in labels] if table.written else labels


def _is_blank(label: object) -> bool:
    return label is None or (isinstance(label, str) and not label.strip())


def _type_of(
    table: Table, column: str, labels: Sequence[object]
) -> type[bool] | type[int] | type[str] | type[float]:
    if table.written:
        return _type_as_written([str(label) for label in labels])
    types = {type(label) for label in labels}
    if types <= {int, float, decimal.Decimal} and types != {int}:
        return float
    for allowed in (bool, int, str):
        if types == {allowed}:
            return allowed
    names = sorted(found.__name__ for found in types)
    raise InputError(
        f"{table.source}: labels in column {column!r} are of type {' and '.join(names)}; "
        f"use only strings or only ints for classes, only floats for regression"
    )


def _type_as_written(labels: Sequence[str]) -> type[int] | type[str] | type[float]:
    if all(_WHOLE.fullmatch(label) for label in labels):
        return int
    numbers = [is_number_text(label) for label in labels]
    if any(numbers) and all(
        known or _NOT_FINITE.fullmatch(label) for known, label in zip(numbers, labels, strict=True)
    ):
        return float
    return str


def _as_type(label: object, wanted: type[object]) -> object:
    """A label as a class value; as it stands where it cannot be one."""
    if wanted is int and isinstance(label, str) and _WHOLE.fullmatch(label):
        return int(label)
    if wanted is bool and isinstance(label, str) and label.lower() in ("true", "false"):
        return label.lower() == "true"
    return label


def _number(table: Table, column: str, row: int, label: object) -> float:
    value = math.nan
    if isinstance(label, (int, float, decimal.Decimal)) and not isinstance(label, bool):
        value = _to_float(label)
    elif table.written and is_number_text(str(label)):
        value = float(str(label))
    if math.isfinite(value):
        return value
    raise InputError(
        f"{table.source}: label {one_line(repr(label), 60)} in row {row} of column {column!r} is "
        f"not a finite number, as regression needs; correct or remove it"
    )


def _to_float(label: int | float | decimal.Decimal) -> float:
    try:
        return float(label)
    except (OverflowError, ValueError):
        return math.nan
