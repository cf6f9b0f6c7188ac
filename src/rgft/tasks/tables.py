"""Tables: a JSON Lines, CSV or Parquet file as named columns of plain Python values."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rgft.errors import InputError


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length.

    Attributes:
        source: Where it comes from, for messages.
        columns: Values by column name, each [rows]; None where a row has no value.
        written: Every value is text as written in a file without types (CSV), so that a number
            still has to be recognised.
    """

    source: str
    columns: Mapping[str, Sequence[object]]
    written: bool = False

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))


def read_table(path: Path) -> Table:
    """Read a file by its suffix, one of `SUFFIXES`.

    Raises:
        InputError: It cannot be read, is not what its suffix says, or has no rows.
    """
    try:
        table = READERS[path.suffix.lower()](path)
    except OSError as problem:
        raise InputError(
            f"{path} cannot be read ({problem.strerror or one_line(problem)}); "
            f"check the file and its permissions"
        ) from problem
    if table.rows == 0:
        raise InputError(f"{path} has no rows; give at least one, or remove the file")
    return table


def one_line(value: object, width: int = 120) -> str:
    r"""`value` as text on one line, cut to `width` characters.

    >>> one_line("a\nb")
    'a b'
    """
    text = " ".join(str(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _read_json(path: Path) -> Table:
    text = _utf8(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = list(_array_rows(path, text))
    else:
        rows = list(_line_rows(path, text))
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names})


def _line_rows(path: Path, text: str) -> Iterator[dict[str, object]]:
    # not splitlines(): JSON strings may hold U+2028 and other characters that it splits at
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_object(_parse_json(path, line, f"line {number}"), path, f"line {number}")


def _array_rows(path: Path, text: str) -> Iterator[dict[str, object]]:
    rows = _parse_json(path, text, "the file")
    assert isinstance(rows, list)  # the text starts with a bracket
    for number, row in enumerate(rows, start=1):
        yield _json_object(row, path, f"row {number}")


def _parse_json(path: Path, text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InputError(
            f"{path}: {where} is not valid JSON ({one_line(problem)}); "
            f'write one object a line, such as {{"text": "...", "label": 0}}'
        ) from problem


def _json_object(row: object, path: Path, where: str) -> dict[str, object]:
    if isinstance(row, dict):
        return row
    raise InputError(
        f"{path}: {where} is a {type(row).__name__}, not an object; "
        f'write one object a line, such as {{"text": "...", "label": 0}}'
    )


def _read_csv(path: Path) -> Table:
    text = _utf8(path)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses long documents
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        rows = list(_csv_rows(path, reader, len(header)))
    except csv.Error as problem:
        raise InputError(
            f"{path} line {reader.line_num} is not valid CSV ({problem}); "
            f"close every quote and double those inside a quoted text"
        ) from problem
    finally:
        csv.field_size_limit(limit)
    columns = {name: [row[at] or None for row in rows] for at, name in enumerate(header)}
    return Table(str(path), columns, written=True)


def _csv_rows(path: Path, reader: Iterator[list[str]], width: int) -> Iterator[list[str]]:
    for number, row in enumerate(reader, start=1):
        if not row:
            continue  # a blank line
        if len(row) != width:
            raise InputError(
                f"{path}: row {number} has {len(row)} fields but the header has {width}; "
                f"put texts that contain commas, quotes or line breaks in double quotes"
            )
        yield row


def _check_header(path: Path, header: Sequence[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column {twice[0]!r}; give each its own name")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise InputError(
            f"{path} has the single column {one_line(header[0])!r}; separate columns with commas"
        )


def _read_parquet(path: Path) -> Table:
    try:
        # ParquetFile reads this file alone; read_table would look around for partitions
        with pq.ParquetFile(path) as file:
            table = file.read()
        _check_header(path, table.column_names)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except InputError:
        raise
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise InputError(
            f"{path} is not a readable Parquet file ({one_line(problem)}); "
            f"it may be truncated: write or copy it again"
        ) from problem
    return Table(str(path), columns)


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(
            f"{path} is not UTF-8 (byte 0x{problem.object[problem.start]:02x} at position "
            f"{problem.start}); save it as UTF-8"
        ) from problem


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(READERS)
