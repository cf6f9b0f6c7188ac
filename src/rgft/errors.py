"""The exceptions that users meet."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

TABLES_NEED = "tables need pandas and pyarrow, which are not installed: pip install 'rgft[train]'"


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what arrived, what is allowed, what to do. The command line prints it
    without a traceback and exits with code 2.
    """


def unknown(what: str, name: str, allowed: Iterable[str], more: str = "") -> InputError:
    """The error for a name that is none of those `allowed`: it asks after the nearest of them.

    >>> print(unknown("method", "rgtf", ["rgft", "full"]))
    unknown method 'rgtf' (did you mean 'rgft'?); allowed: rgft, full
    >>> print(unknown("policy", "x", ["rank", "top"], ", or a Policy"))
    unknown policy 'x'; allowed: rank, top, or a Policy
    """
    names = list(allowed)
    nearest = difflib.get_close_matches(name, names, n=1)
    asked = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return InputError(f"unknown {what} {name!r}{asked}; allowed: {', '.join(names)}{more}")


class EngagementError(RuntimeError):
    """A plan was not carried out: something outside the library defeated freezing or truncation."""
