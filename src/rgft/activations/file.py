"""Byte strings in one file, each with a checksum."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """Where a byte string is: offset and size in bytes, and its CRC-32."""

    offset: int
    size: int
    checksum: int


class EntryFile:
    """A file to which entries are added and from which they are dropped.

    Space of dropped entries is used again, but not before `settle`: an index that is already
    written may still lead there. Reads and writes are ordinary ones: to write to a mapped file on a
    full disk, or to read one that someone has cut, would end the process.

    Args:
        path: The file; what it holds at `places` is kept.
        places: Entries that are there already.
        free_bytes: Room on the disk that is left to others.

    Attributes:
        used: Bytes of the entries.
    """

    def __init__(self, path: Path, places: list[Place], free_bytes: int) -> None:
        self.path = path
        self.used = sum(place.size for place in places)
        self._free_bytes = free_bytes
        self._end = max((place.offset + place.size for place in places), default=0)
        self._dropped: list[Place] = []
        self._holes: dict[int, list[int]] = {}  # offsets by size
        path.touch()
        os.truncate(path, self._end)

    def write(self, data: bytes) -> Place:
        """Add an entry.

        Raises:
            OSError: There is no room.
        """
        room = shutil.disk_usage(self.path.parent).free - len(data)
        if room < self._free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        holes = self._holes.get(len(data))
        offset = holes[-1] if holes else self._end
        with self.path.open("rb+", buffering=0) as file:
            file.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) or 0 :]
        if holes:
            holes.pop()
        else:
            self._end += len(data)
        self.used += len(data)
        return Place(offset, len(data), zlib.crc32(data))

    def read(self, place: Place) -> bytearray | None:
        """An entry, or None if it is damaged."""
        data = bytearray(place.size)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(place.offset)
                count = file.readinto(data)
        except OSError:
            return None
        whole = count == place.size and zlib.crc32(data) == place.checksum
        return data if whole else None

    def drop(self, place: Place) -> None:
        """Give up an entry."""
        self.used -= place.size
        self._dropped.append(place)

    def settle(self) -> None:
        """Let dropped entries be overwritten: no index leads to them any more."""
        for place in self._dropped:
            self._holes.setdefault(place.size, []).append(place.offset)
        self._dropped.clear()

    def sync(self) -> None:
        """Wait until the entries are on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Give up all entries."""
        os.truncate(self.path, 0)
        self.used = self._end = 0
        self._dropped.clear()
        self._holes.clear()
