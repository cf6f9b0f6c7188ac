"""How a command ends: one line for what its user or the machine can mend, and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

from rgft.launch import claim_last_word, ended_elsewhere, lost_another
from rgft.storage import storage_problem

MISPLACED = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, an accelerator's, or what torch allocates on the host."""
    kind, text = type(error).__name__, str(error)
    return kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text


def fail(message: str, code: int) -> NoReturn:
    """One line to standard error, of one process if there are several, then exit."""
    if claim_last_word(code):
        print(f"rgft: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def fail_for(error: OSError | MemoryError | RuntimeError) -> NoReturn:
    """One line for what files, memory and other processes can do; other errors are raised again."""
    ended = ended_elsewhere()
    if ended is not None:
        raise SystemExit(ended)
    if lost_another(error):
        fail(f"another process of the run has ended ({error}); see what it said", 1)
    if isinstance(error, OSError):
        code = 2 if isinstance(error, MISPLACED) or storage_problem(error) else 1
        fail(f"{error.filename or 'input/output'}: {error.strerror or error}", code)
    if out_of_memory(error):
        fail(f"out of memory: {error or 'there is no more'}; give a lower --batch-size", 1)
    claim_last_word(1)
    raise error
