"""Notes of a command: warnings as lines on standard error, as soon as they are known."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from rgft.launch import leads


def note(text: object) -> None:
    """Write a note, of one process if there are several; above bars, where there are some."""
    if leads():
        tqdm.write(f"rgft: note: {' '.join(str(text).split())}", file=sys.stderr)


@contextmanager
def notes_at_once() -> Iterator[None]:
    """Warnings in the block become notes, each text once; those for developers are left out."""
    told: set[str] = set()

    def tell(message: Warning | str, *where: object, **how: object) -> None:
        del where, how
        if str(message) not in told:
            told.add(str(message))
            note(message)

    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = tell
        yield
