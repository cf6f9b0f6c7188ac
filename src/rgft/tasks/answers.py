"""Answers of a table, which a model learns to write: one text a row, or several that all answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from rgft.errors import InputError
from rgft.tasks.columns import require_column
from rgft.tasks.tables import Table, one_line
from rgft.tasks.texts import is_unicode

_LOG = logging.getLogger(__name__)


def check_answers(table: Table, column: str) -> list[list[str]]:
    """The answers of each row, [rows][answers]: at least one, none of them blank.

    Raises:
        InputError: The column is missing, or a row has no answer.
    """
    found = []
    for row, value in enumerate(table.columns[require_column(table, column, "--target-column")], 1):
        answers = value if isinstance(value, list) else [value]
        texts = [text for text in answers if isinstance(text, str) and text.strip()]
        if not answers or len(texts) < len(answers):
            raise InputError(
                f"{table.source}: row {row} has no text to learn in column {column!r} "
                f"({one_line(repr(value), 60)}); correct or remove it"
            )
        if not all(map(is_unicode, texts)):
            raise InputError(
                f"{table.source}: row {row} of column {column!r} is not valid Unicode (lone "
                "surrogates); correct or remove it"
            )
        found.append(texts)
    return found


def with_whole_texts(table: Table, inputs: Sequence[str], target: str) -> Table:
    """Input texts that come as lists of sentences joined, and rows without text left out.

    Public sets of documents have a few rows of which nothing but the address is left.
    """
    for column in (*inputs, target):
        require_column(table, column, "the file")
    columns = dict(table.columns)
    for name in inputs:
        columns[name] = [_joined(value) for value in columns[name]]
    kept = [
        all(not isinstance(value, str) or value.strip() for value in row)
        for row in zip(*(columns[name] for name in (*inputs, target)), strict=True)
    ]
    if not all(kept):
        left_out = kept.count(False)
        _LOG.warning(
            "%s: %d of %d rows have no text and are left out", table.source, left_out, len(kept)
        )
    return replace(
        table,
        columns={
            name: [value for value, wanted in zip(values, kept, strict=True) if wanted]
            for name, values in columns.items()
        },
    )


def _joined(value: object) -> object:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return value
