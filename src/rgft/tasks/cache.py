"""The cache folder: splits as JSON Lines beside a manifest that says what they must hash to."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rgft.atomic import atomic_path, folder_made_once
from rgft.errors import InputError
from rgft.storage import storage_problem

HOME_VARIABLE = "RGFT_HOME"
_MANIFEST = "manifest.json"
_LOG = logging.getLogger(__name__)

Row = Mapping[str, object]


def cache_home() -> Path:
    """The folder that `RGFT_HOME` names, by default `~/.cache/rgft`."""
    return Path(os.environ.get(HOME_VARIABLE) or Path("~", ".cache", "rgft").expanduser())


def store(path: Path, content: bytes) -> None:
    """Write a file of the cache whole; makes its folder.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as problem:
        raise _unwritable(path, problem.strerror) from problem


def store_folder(
    name: str, find: Callable[[], Path], write: Callable[[Path, Path], object]
) -> Path:
    """A folder of the cache, made of a source; if it is there already nothing is done.

    Args:
        name: Where it is in the cache.
        find: Where the source is, or raises what it lacks, before anything is made.
        write: Fills, of the source, the folder that it gets beside it.

    Raises:
        InputError: It cannot be written.
    """
    place = cache_home() / name
    if place.is_dir():
        return place
    source = find()
    try:
        return folder_made_once(place, lambda staging: write(source, staging))
    except Exception as error:
        if reason := storage_problem(error):
            raise _unwritable(place, reason) from error
        raise


def _unwritable(path: Path, reason: str | None) -> InputError:
    return InputError(
        f"cannot write {path} ({reason}); make room or make its folder writable, or set "
        f"{HOME_VARIABLE} to a folder that is"
    )


def store_splits(
    folder: Path, splits: Mapping[str, Sequence[Row]], version: int, counts: Mapping[str, object]
) -> None:
    """Write each split as JSON Lines, then the manifest, which makes them valid.

    Args:
        folder: Where to; made if need be.
        splits: Rows by split name.
        version: Raised whenever parsing or splitting changes, so that older caches are rebuilt.
        counts: What parsing dropped and kept, for the reader of the manifest.
    """
    contents = {f"{name}.jsonl": _lines(rows) for name, rows in splits.items()}
    for name, content in contents.items():
        store(folder / name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = {"version": version, "sha256": hashes, "counts": counts}
    store(folder / _MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")


def stored_splits(folder: Path, names: Sequence[str], version: int) -> dict[str, list[Row]] | None:
    """The splits in `folder`, or None where they have to be built anew.

    That is where there are none, they are of another version, or one is not what the manifest
    says; the last is logged.
    """
    if not (folder / _MANIFEST).exists():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["version"] != version:
            return None
        contents = {name: (folder / f"{name}.jsonl").read_bytes() for name in names}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != manifest["sha256"][f"{name}.jsonl"]:
                raise ValueError(f"{name}.jsonl has changed")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        _LOG.warning("the cache %s is damaged (%s) and will be rebuilt", folder, problem)
        return None
    return {
        name: [json.loads(line) for line in content.splitlines()]
        for name, content in contents.items()
    }


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
