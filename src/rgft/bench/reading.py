"""YAML with nothing silently ignored: duplicate and unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rgft.errors import InputError, unknown


class _Strict(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader, which takes the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is no text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: The file is missing or no YAML, holds something else, or a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; give the YAML file of a suite") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}); give a YAML file") from error
    try:
        values = yaml.load(text, _Strict)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        said = " ".join(str(error.problem).split())
        raise InputError(f"{path}{line}: {said}; see docs/benchmarks.md") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no mapping; a suite has arms, tasks, seeds, ...")
    return values


def check_keys(where: str, values: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Every key must be one of those `allowed`.

    >>> check_keys("suite", {"arm": 1}, ["arms", "tasks"])
    Traceback (most recent call last):
    rgft.errors.InputError: suite: unknown key 'arm' (did you mean 'arms'?); allowed: arms, tasks
    """
    names = list(allowed)
    for key in values:
        if key not in names:
            raise InputError(f"{where}: {unknown('key', key, names)}")


def mapping(where: str, value: object) -> dict[str, Any]:
    """`value`, if it is a mapping; of nothing at all, an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where} is {value!r}; allowed: a mapping, one 'key: value' a line")
    return value


def sequence(where: str, value: object) -> list[Any]:
    """`value`, if it is a list with something in it and nothing twice."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {value!r}; allowed: a list such as [a, b]")
    for index, item in enumerate(value):
        if item in value[:index]:
            raise InputError(f"{where} has {item!r} twice; keep one")
    return value


def text(where: str, value: object) -> str:
    """`value`, if it is a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} is {value!r}; allowed: a text")
    return value
