"""Notes of a command: warnings as lines on standard error, as soon as they are known."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from rgft.budgeting import MOST_VISITS
from rgft.launch import leads
from rgft.spending import parse_budget

TOLERANCE = 0.02  # of full fine-tuning, by which a run may miss its budget unsaid


def note(text: object) -> None:
    """Write a note, of one process if there are several; above bars, where there are some."""
    if leads():
        tqdm.write(f"rgft: note: {' '.join(str(text).split())}", file=sys.stderr)


def missed(record: Mapping[str, Any]) -> str:
    """What to say of a finished run that ended well beside its share of full fine-tuning, if so.

    >>> missed({"budget": "0.1", "flops": {"share": 0.11}})
    ''
    >>> missed({"budget": "0.1", "flops": {"share": 0.25}})[:59]
    'the run spent 25.0% of full fine-tuning, over its budget of'
    >>> few = {"budget": "0.3", "flops": {"share": 0.08}, "rows": {"train": 50}, "epochs": 1}
    >>> missed({**few, "visits": 200})[67:94]
    'it makes at most 4 passes f'
    >>> missed({**few, "visits": 32})[67:91]
    'a run has at least one s'
    """
    if record["budget"] is None:
        return ""
    share, spent = parse_budget(record["budget"]).share, record["flops"]["share"]
    if share is None or abs(spent - share) <= TOLERANCE:
        return ""
    side = "over" if spent > share else "under"
    if side == "under" and _is_at_most_visits(record):
        why = (
            f"it makes at most {MOST_VISITS} passes for each of --epochs; give more of them, train "
            "deeper, or give a smaller --budget"
        )
    else:
        why = (
            "a run has at least one step, and ends with the whole one nearest to it; give a larger "
            "--budget, a lower --batch-size, or more data"
        )
    return f"the run spent {spent:.1%} of full fine-tuning, {side} its budget of {share:.1%}: {why}"


def _is_at_most_visits(record: Mapping[str, Any]) -> bool:
    """Whether a run ended in the last of the passes that a budget may buy."""
    passes = record["visits"] / record["rows"]["train"]
    return bool(passes > MOST_VISITS * record["epochs"] - 1)


def undecided(record: Mapping[str, Any]) -> str:
    """What to say of a finished run whose budget ended before the method's first decision.

    >>> undecided({"budget": "0.1", "idle": False})
    ''
    """
    if record["budget"] is None or not record.get("idle"):
        return ""
    return (
        "the budget ended before the method's first decision, so that the run was plain "
        "fine-tuning; give a larger --budget, or --set a lower every or warmup"
    )


def afterwards(record: Mapping[str, Any]) -> list[str]:
    """What to say of a finished run."""
    return list(filter(None, (missed(record), undecided(record))))


@contextmanager
def notes_at_once() -> Iterator[list[str]]:
    """Warnings in the block become notes, each text once; those for developers are left out.

    Yields:
        The notes so far.
    """
    told: list[str] = []

    def tell(message: Warning | str, *where: object, **how: object) -> None:
        del where, how
        if str(message) not in told:
            told.append(str(message))
            note(message)

    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = tell
        yield told
