"""Whether an error means that files cannot be written: a full disk, a quota, a limit."""

from __future__ import annotations

import errno
import os

REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
WRITERS = ("PytorchStreamWriter", "unexpected pos", "file write failed")  # of torch.save


def storage_problem(error: BaseException) -> str | None:
    """What prevents writing, or None if the error is of another kind.

    torch and safetensors turn the error of the operating system into a text.

    >>> storage_problem(OSError(28, "No space left on device"))
    'No space left on device'
    >>> storage_problem(ValueError("of another kind")) is None
    True
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in REASONS else None
    text = str(error)
    for number in REASONS:
        if f"os error {number}" in text or os.strerror(number) in text:
            return os.strerror(number)
    if isinstance(error, RuntimeError) and any(writer in text for writer in WRITERS):
        return "a file could not be written to its end (is the disk full?)"
    return None
