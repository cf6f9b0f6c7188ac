"""The texts of a table, each checked to be one."""

from __future__ import annotations

from collections.abc import Sequence

from rgft.errors import InputError
from rgft.tasks.columns import require_column
from rgft.tasks.tables import Table


def check_texts(table: Table, columns: Sequence[str]) -> dict[str, list[str]]:
    """The text columns by name, every text a non-blank string, each [rows].

    Raises:
        InputError: A column is missing, or a text is missing, blank, no string or no Unicode.
    """
    texts = {}
    for column in columns:
        values = table.columns[require_column(table, column, "--text-columns")]
        _refuse(table, column, "have no text", [not _has_text(value) for value in values])
        _refuse(table, column, "are not strings", [not isinstance(value, str) for value in values])
        texts[column] = [str(value) for value in values]
        surrogates = [not is_unicode(text) for text in texts[column]]
        _refuse(table, column, "are not valid Unicode (lone surrogates)", surrogates)
    return texts


def _refuse(table: Table, column: str, problem: str, bad: Sequence[bool]) -> None:
    if any(bad):
        raise InputError(
            f"{table.source}: {sum(bad)} of {len(bad)} rows {problem} in column {column!r}, "
            f"the first is row {list(bad).index(True) + 1}; correct or remove them"
        )


def _has_text(value: object) -> bool:
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: no half of a pair stands alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
