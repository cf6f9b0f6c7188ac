"""Records of a suite: JSON Lines that only grow, a whole line at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from rgft.errors import InputError

FILE = "records.jsonl"
WAIT = 60.0  # seconds for another process that is writing a line


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file, in order; a last line without its end, torn by a crash, is none.

    Raises:
        InputError: A whole line is no JSON object: the file is damaged, or of another kind.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    del torn
    records = []
    mend = "remove the line" if path.suffix == ".jsonl" else "give a file of records"
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON ({error}); {mend}") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} is no JSON object; {mend}")
        records.append(record)
    return records


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The same of a file that `rgft bench` has written.

    Raises:
        InputError: A record tells not which cell it is of, or how it ended.
    """
    records = read_records(path)
    for number, record in enumerate(records, 1):
        for name in ("key", "status"):
            if name not in record:
                raise InputError(f"{path}, line {number} has no {name!r}; remove the line")
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line, on disk when this returns; what a crash has torn before it is cut off."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with FileLock(f"{path}.lock", timeout=WAIT), path.open("a+b", buffering=0) as file:
        end = _whole_lines(file)
        file.truncate(end)
        try:
            written = os.write(file.fileno(), line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {path}")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _whole_lines(file: Any) -> int:
    """Bytes up to the end of the last whole line."""
    end = int(file.seek(0, os.SEEK_END))
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + int(at) + 1
        end = start
    return 0
