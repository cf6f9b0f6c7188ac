"""The index of an entry file: what is where, and of which model and data it speaks."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rgft.activations.file import Place
from rgft.atomic import write_text_atomically

VERSION = 1
Key = int | str


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a stored tensor.

    Attributes:
        tag: Free text of whoever stored it.
        shape: Of the tensor.
        dtype: Of the tensor, before it was encoded.
        place: Where it is in the file; None if it is in memory alone.
    """

    tag: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: Place | None


def write_index(path: Path, entries: Mapping[Key, Entry], *, kind: str, fingerprint: str) -> None:
    """Write the index in one piece: a line of header, a line of entries.

    Args:
        path: The index file.
        entries: Those in memory alone are left out.
        kind: The format of the values.
        fingerprint: What the values depend on.
    """
    rows: list[list[Any]] = [
        [key, e.tag, e.shape, str(e.dtype).removeprefix("torch."), *_numbers(e.place)]
        for key, e in entries.items()
        if e.place is not None
    ]
    size = max((row[4] + row[5] for row in rows), default=0)
    body = json.dumps(rows, separators=(",", ":"))
    header = _header(kind, fingerprint) | {"size": size, "checksum": zlib.crc32(body.encode())}
    write_text_atomically(path, f"{json.dumps(header)}\n{body}\n")


def read_index(path: Path, data: Path, *, kind: str, fingerprint: str) -> dict[Key, Entry] | str:
    """The entries, or why they must not be used."""
    try:
        head, body = path.read_text(encoding="utf-8").split("\n")[:2]
        header = json.loads(head)
        if header["checksum"] != zlib.crc32(body.encode()):
            return "its index is damaged"
        for name, wanted in _header(kind, fingerprint).items():
            if header[name] != wanted:
                return f"its {name} is {header[name]!r}, not {wanted!r}"
        if data.stat().st_size < header["size"]:
            return "its data file has been cut"
        return {row[0]: _entry(row) for row in json.loads(body)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "its index cannot be read"


def _header(kind: str, fingerprint: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "byte order": sys.byteorder,
        "format": kind,
        "fingerprint": fingerprint,
    }


def _numbers(place: Place) -> tuple[int, int, int]:
    return place.offset, place.size, place.checksum


def _entry(row: list[Any]) -> Entry:
    _, tag, shape, name, offset, size, checksum = row
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return Entry(tag, tuple(shape), dtype, Place(offset, size, checksum))
