"""Checked access to a JSON object: a wrong value becomes one line that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rgft.errors import InputError

NOT_MEASURED = float("nan")


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose values are checked as they are read.

    Every reader raises `InputError` where the key is missing or holds another type.

    Attributes:
        values: The object as `json.loads` gives it.
        source: File that it came from, for messages.
        path: Keys that led to it, joined by dots; empty for the outermost object.

    Example:
        >>> Fields({"flops": {"share": 0.3}}, "run.json").inside("flops").number("share")
        0.3
    """

    values: Mapping[str, object]
    source: str
    path: str = ""

    def text(self, key: str) -> str:
        """The string at `key`."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """The string at `key`, None for null."""
        return None if self._get(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        """The integer at `key`."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "an integer")
        return value

    def number(self, key: str) -> float:
        """The number at `key`; NaN for null, which stands for "not measured"."""
        value = self._get(key)
        if value is None:
            return NOT_MEASURED
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, value, "a number or null")
        return float(value)

    def inside(self, key: str) -> Fields:
        """The object at `key`."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(value, self.source, self._path(key))

    def rows(self, key: str) -> list[Fields]:
        """The list of objects at `key`."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self._wrong(key, value, "a list of objects")
        return [
            Fields(row, self.source, f"{self._path(key)}[{index}]")
            for index, row in enumerate(value)
        ]

    def numbers(self, key: str) -> dict[str, float]:
        """The object at `key` that holds numbers only."""
        inner = self.inside(key)
        return {name: inner.number(name) for name in inner.values}

    def _path(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _get(self, key: str) -> object:
        if key not in self.values:
            raise InputError(
                f'{self.source} has no "{self._path(key)}": it is not a whole run record; '
                "name a folder that `rgft train` wrote"
            )
        return self.values[key]

    def _wrong(self, key: str, value: object, wanted: str) -> InputError:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        return InputError(
            f'{self.source}: "{self._path(key)}" is {shown} where {wanted} is needed; '
            "the file is damaged, train the run again"
        )
