"""Splits by the hash of the input: a text or image always lands on the same side, in any order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import datasets

from rgft.errors import InputError
from rgft.tasks.task import Input, TaskData, split_in_memory

VALIDATION_SHARE = 0.1
_LOG = logging.getLogger(__name__)


def unit_hash(*inputs: Input) -> float:
    """A number in [0, 1) that depends on the inputs alone: their SHA-256, first 53 bits.

    >>> unit_hash("a fine film") == unit_hash("a fine film")
    True
    >>> 0 <= unit_hash("premise", "hypothesis") < 1
    True
    """
    # lengths keep ("ab", "c") apart from ("a", "bc")
    key = b"".join(f"{len(value)}:".encode() + _encoded(value) for value in inputs)
    return (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 11) / (1 << 53)


def _encoded(value: Input) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def fewer_train_rows(task: TaskData, count: int) -> TaskData:
    """The task with `count` of its training rows: those whose inputs hash lowest, in their order.

    Raises:
        InputError: There are no more than `count`.
    """
    rows = task.splits["train"]
    if count >= len(rows):
        raise InputError(
            f"max_train_rows is {count}, but there are {len(rows)} training rows; give fewer, or "
            "drop it"
        )
    return replace(task, splits={**task.splits, "train": _lowest(task, rows, count)})


def fewer_evaluation_rows(task: TaskData, count: int) -> TaskData:
    """The task with at most `count` rows, those that hash lowest, in every split but "train".

    Raises:
        InputError: No split has more than `count`.
    """
    most = max(len(rows) for name, rows in task.splits.items() if name != "train")
    if count >= most:
        raise InputError(
            f"max_evaluation_rows is {count}, but validation and test have {most} rows or fewer; "
            "give fewer, or drop it"
        )
    splits = {
        name: rows if name == "train" or len(rows) <= count else _lowest(task, rows, count)
        for name, rows in task.splits.items()
    }
    return replace(task, splits=splits)


def _lowest(task: TaskData, rows: datasets.Dataset, count: int) -> datasets.Dataset:
    inputs = zip(*(rows[name][:] for name in task.input_columns), strict=True)
    lowest = sorted((unit_hash(*key), row) for row, key in enumerate(inputs))[:count]
    return rows.select(sorted(row for _, row in lowest))


def carve_validation(
    inputs: Sequence[tuple[Input, ...]],
    strata: Sequence[int],
    share: float = VALIDATION_SHARE,
) -> list[bool]:
    """Which training rows become validation rows.

    Within each stratum (class) the distinct inputs are ranked by their hash; those with the lowest
    relative rank over all strata are taken, so that every class gives about the same share, none
    gives its last input, and equal inputs go together.

    Args:
        inputs: The texts, or the image, of each row, [rows].
        strata: The class of each row (one constant for regression), [rows].
        share: Part of the distinct inputs to take, in [0, 0.5).

    Returns:
        True where the row goes to validation, [rows]; at least one, unless every class has only
        one distinct input.
    """
    stratum_of: dict[tuple[Input, ...], int] = {}
    for key, stratum in zip(inputs, strata, strict=True):
        # an input with two labels counts as the lower one, whichever row comes first
        stratum_of[key] = min(stratum, stratum_of.get(key, stratum))
    members: dict[int, list[tuple[float, tuple[Input, ...]]]] = {}
    for key, stratum in stratum_of.items():
        members.setdefault(stratum, []).append((unit_hash(*key), key))
    ranked = [
        ((rank + 0.5) / len(keys), at, key)
        for keys in members.values()
        for rank, (at, key) in enumerate(sorted(keys))
        if len(keys) > 1
    ]
    wanted = max(1, round(share * len(stratum_of)))
    taken = {key for _, _, key in sorted(ranked)[:wanted]}
    return [key in taken for key in inputs]


def with_validation(
    splits: Mapping[str, datasets.Dataset],
    input_columns: Sequence[str],
    label_column: str,
    source: str,
) -> dict[str, datasets.Dataset]:
    """The splits, with "validation" carved out of "train" where there is none.

    Raises:
        InputError: There is none and the training split is too small to give rows away.
    """
    if "validation" in splits:
        return dict(splits)
    train = splits["train"]
    labels = train[label_column][:]
    inputs = list(zip(*(train[column][:] for column in input_columns), strict=True))
    strata = labels if isinstance(labels[0], int) else [0] * len(labels)
    taken = carve_validation(inputs, strata)
    if not any(taken):
        raise InputError(
            f"{source} has no validation split and its training split is too small to carve one "
            f"out; give a validation file"
        )
    parts = {
        name: _rows_where(train, input_columns, label_column, [take is wanted for take in taken])
        for name, wanted in (("train", False), ("validation", True))
    }
    _LOG.info(
        "%s has no validation split: %d of its %d training rows, chosen by hash, take its place",
        *(source, len(parts["validation"]), len(train)),
    )
    return {**parts, **{name: rows for name, rows in splits.items() if name != "train"}}


def _rows_where(
    rows: datasets.Dataset, input_columns: Sequence[str], label_column: str, keep: Sequence[bool]
) -> datasets.Dataset:
    """A copy rather than `Dataset.select`, which would leave every row reachable beneath it."""

    def kept(column: str) -> list[object]:
        return [value for value, wanted in zip(rows[column][:], keep, strict=True) if wanted]

    inputs = {column: kept(column) for column in input_columns}
    return split_in_memory(inputs, label_column, kept(label_column))  # type: ignore[arg-type]
