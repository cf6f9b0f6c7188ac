"""The exceptions and warnings that users meet."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

TABLES_NEED = "tables need pandas and pyarrow, which are not installed: pip install 'rgft[train]'"
PASSED_OVER = (  # packages whose lines a warning does not point at
    *("rgft", "torch", "transformers", "accelerate", "trl", "peft", "sentence_transformers"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
    *("contextlib", "functools", "threading", "tqdm"),
)


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
    >>> print(unknown("setting", "rank", ["rate", "galore_rank"]))
    unknown setting 'rank' (did you mean 'galore_rank'?); allowed: rate, galore_rank
    >>> print(unknown("column", "label", ["labels", "fine_label"]))
    unknown column 'label' (did you mean 'labels'?); allowed: labels, fine_label
    """
    names = list(allowed)
    nearest = difflib.get_close_matches(name, names, n=1)
    if not any(other.startswith(name) for other in nearest):
        nearest = [other for other in names if other.endswith(f"_{name}")] or nearest
    asked = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return InputError(f"unknown {what} {name!r}{asked}; allowed: {', '.join(names)}{more}")


class EngagementError(RuntimeError):
    """A plan was not carried out: something outside the library defeated freezing or truncation."""


def warn(message: str) -> None:
    """A RuntimeWarning, at the line of the user's code from which the frameworks were called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
