"""Which columns of a table hold the texts and the label."""

from __future__ import annotations

from collections.abc import Sequence

from rgft.errors import InputError
from rgft.tasks.labels import is_number_text
from rgft.tasks.tables import Table

LABEL_NAMES = (
    *("label", "labels", "target", "targets", "class", "category", "score", "rating"),
    *("stars", "sentiment", "gold", "gold_label", "y"),
)
TEXT_NAMES = ("text", "sentence", "document", "content", "review", "comment", "tweet", "body")
PAIR_NAMES = (
    *(("sentence1", "sentence2"), ("text1", "text2"), ("text_a", "text_b")),
    *(("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("question", "passage"), ("query", "passage"), ("query", "document")),
)
ID_NAMES = ("", "id", "idx", "index", "guid", "uid", "uuid")


def find_label_column(table: Table, named: str | None = None) -> str:
    """The label column: the one named, or the only one with a name from `LABEL_NAMES`.

    Raises:
        InputError: The column named is missing; or none, or more than one, is found.
    """
    if named is not None:
        return require_column(table, named, "--label-column")
    found = [name for name in table.columns if name.lower() in LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    problem = (
        f"{found} could each be the label"
        if found
        else f"no label column was recognised: none is called {', '.join(LABEL_NAMES)}"
    )
    raise InputError(
        f"{table.source}: {problem} (columns: {list(table.columns)}); "
        "name it with --label-column, or with --target-column if it holds texts to write"
    )


def find_text_columns(
    table: Table, label_column: str, named: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The text columns: those named, or the one or two that hold strings.

    Identifiers and columns that only restate the label (its name beside its number) do not count:
    taking the latter for a text would give the answer away. A pair with well-known names is taken
    from among others; apart from that, anything but one or two string columns is refused, and so
    are two of which just one is called `text` or the like.

    Raises:
        InputError: A column named is missing or the label; or the choice is not clear.
    """
    if named is not None:
        if label_column in named:
            raise InputError(
                f"text columns {list(named)} cannot be used: {label_column!r} is the label column; "
                "correct --text-columns, or name the label with --label-column"
            )
        return require_texts(table, named)
    strings = [
        name
        for name, values in table.columns.items()
        if name != label_column
        and name.lower() not in ID_NAMES
        and not name.lower().endswith("_id")
        and _holds_strings(table, values)
        and not _restates(values, table.columns[label_column])
    ]
    lowered = {name.lower(): name for name in strings}
    pairs = [pair for pair in PAIR_NAMES if set(pair) <= set(lowered)]
    if len(pairs) == 1:
        return tuple(lowered[name] for name in pairs[0])
    known = [name for name in strings if name.lower() in TEXT_NAMES]
    if len(strings) == 1 or (len(strings) == 2 and not known):
        return tuple(strings)
    problem = f"{strings} could each be the text" if strings else "no column of texts was found"
    raise InputError(
        f"{table.source}: {problem} (columns: {list(table.columns)}); "
        f"name one, or two for sentence pairs, with --text-columns (text_columns=...)"
    )


def require_column(table: Table, name: str, option: str) -> str:
    """`name`, if the table has it.

    Raises:
        InputError: It has not; `option` is what the message says to correct.
    """
    if name in table.columns:
        return name
    raise InputError(
        f"{table.source} has no column {name!r} (columns: {list(table.columns)}); "
        f"add it, or correct {option}"
    )


def require_texts(table: Table, named: Sequence[str]) -> tuple[str, ...]:
    """The columns named as texts, if the table has them.

    Raises:
        InputError: One is missing, or they are not one or two.
    """
    if len(named) not in (1, 2) or len(set(named)) != len(named):
        raise InputError(
            f"text columns {list(named)} cannot be used: give one, or two different ones for "
            "sentence pairs, with --text-columns"
        )
    return tuple(require_column(table, name, "--text-columns") for name in named)


def _holds_strings(table: Table, values: Sequence[object]) -> bool:
    present = [value for value in values if value is not None]
    if not present or not all(isinstance(value, str) for value in present):
        return False
    return not (table.written and all(is_number_text(str(value)) for value in present))


def _restates(values: Sequence[object], labels: Sequence[object]) -> bool:
    """Whether each label goes with one value only, over two rows a label or more."""
    keys = [repr(label) for label in labels]
    pairs = {(key, repr(value)) for key, value in zip(keys, values, strict=True)}
    return len(pairs) == len(set(keys)) <= len(keys) / 2
