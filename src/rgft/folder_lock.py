"""One process at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rgft.errors import InputError

try:
    import fcntl
except ImportError:  # not a Unix: folders cannot be locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same folder out of it, until the block or this ends.

    Nothing is written: the system lets go of the lock however the process ends.

    Raises:
        InputError: Another one has it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is running in {folder}; wait for it, or give another --output-dir"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
