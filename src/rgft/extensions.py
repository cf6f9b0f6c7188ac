"""Methods and tasks of a user's own, from Python files that are named on the command line."""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgft.errors import InputError
from rgft.methods import METHODS, Method
from rgft.tasks import TASKS, TaskEntry

TABLES: Mapping[str, tuple[dict[str, Any], type]] = {
    "METHODS": (METHODS, Method),
    "TASKS": (TASKS, TaskEntry),
}
_LOADED: set[Path] = set()
_DIGESTS: dict[tuple[str, str | None], str] = {}  # table and name -> SHA-256 of the file


def extend(files: tuple[str, ...]) -> None:
    """Runs Python files and adds their `METHODS` and `TASKS` to those that are here.

    Each is a dict from names to values as `rgft.methods` and `rgft.tasks` have them. A file that
    has been added in this process is not run again.

    Args:
        files: Paths of the files; only what the user names is ever run.

    Raises:
        InputError: A file is missing or fails, has neither dict, or something else in it, or a name
            is taken.
    """
    for file in files:
        path = Path(file).resolve()
        if path not in _LOADED:
            _add(path)
            _LOADED.add(path)


def digests(method: str, task: str | None) -> list[str]:
    """SHA-256 of the files that this method and this task came from, if they came from any."""
    places = ("METHODS", method), ("TASKS", task)
    return sorted({_DIGESTS[place] for place in places if place in _DIGESTS})


def _add(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is no file; give --extend a Python file with METHODS or TASKS")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:
        raise InputError(f"{path} fails: {type(error).__name__}: {error}; mend it") from error
    added = {name: found[name] for name in TABLES if name in found}
    if not added:
        raise InputError(f"{path} has neither METHODS nor TASKS; give it a dict of that name")
    for name, entries in added.items():
        _check(path, name, entries)
    for name, entries in added.items():
        TABLES[name][0].update(entries)
        _DIGESTS.update({(name, entry): digest for entry in entries})


def _check(path: Path, name: str, entries: object) -> None:
    here, kind = TABLES[name]
    if not isinstance(entries, dict):
        raise InputError(
            f"{path}: {name} is no dict from names to {kind.__name__} values; make it one"
        )
    for key, entry in entries.items():
        if not isinstance(entry, kind):
            raise InputError(
                f"{path}: {name} has {type(entry).__name__} under {key!r}; make it a "
                f"{kind.__name__}"
            )
    taken = sorted(set(entries) & set(here))
    if taken:
        raise InputError(
            f"{path}: {name} has {taken[0]!r}, which is there already; give it another name"
        )
