"""Files and folders that are either whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX, SUFFIX = ".rgft-", ".tmp"  # of the names of unfinished files, which nobody else has


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file in the same folder, moved to `path` when the block ends without an error.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    temporary = path.with_name(f"{PREFIX}{path.name}.{os.getpid()}{SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def folder_made_once(place: Path, write: Callable[[Path], object]) -> Path:
    """`place`, which `write` has filled; if it is there already nothing is done.

    Args:
        place: The folder.
        write: Puts files into the folder that it gets, which takes its place when they are on disk.

    Example:
        >>> place = Path(tempfile.mkdtemp()) / "model"
        >>> [file.name for file in folder_made_once(place, lambda f: (f / "a").touch()).iterdir()]
        ['a']
        >>> folder_made_once(place, lambda f: 1 / 0) == place
        True
    """
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=place.parent, prefix=PREFIX, suffix=SUFFIX))
    try:
        write(staging)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors and mkdtemp are for the owner's eyes alone
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        staging.chmod(0o755)
        staging.rename(place)
    except OSError:
        if not place.is_dir():  # another process was first
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return place
