"""Tensors by sample: in memory up to a bound, the rest in a file."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rgft.activations.encoding import FORMATS, Encoded, decode, encode, from_bytes, to_bytes
from rgft.activations.file import EntryFile
from rgft.activations.index import Entry, Key, read_index, write_index
from rgft.errors import InputError, warn

DATA, INDEX = "activations.bin", "activations.json"
MIN_UNSAVED = 256  # new entries after which the index is written, at the least
DEFAULT_BYTES = 2**30


class ActivationStore:
    """Tensors of any shape, one a sample, found again by the sample's id.

    The first ones that fit stay in memory for good and the rest go to a file: epochs visit every
    sample once, so that to keep the latest would miss each time. Entries in a file carry a
    checksum; a damaged one is dropped with a warning, as if it had never been stored. When the disk
    is full the store warns and takes no more than fits in memory.

    Args:
        folder: Where all entries are written, so that a later run finds them; None for a temporary
            one that holds only what exceeds the memory.
        format: "float32" (exact), "bfloat16" or "int8" (see `rgft.activations.encoding.encode`).
        memory_bytes: Bound for the entries in memory.
        fingerprint: What the entries depend on. A folder with another one is emptied with a
            warning; its entries are never used.
        free_bytes: Room on the disk that is left to others.

    Attributes:
        damaged: Entries that were dropped because their bytes had changed.

    Raises:
        InputError: The format is unknown, a bound is negative, or the folder cannot be written to.

    >>> import torch
    >>> store = ActivationStore(memory_bytes=16)
    >>> store.put("a", torch.ones(4)), store.put(2, torch.zeros(1, 3))
    (True, True)
    >>> store.get("a"), store.memory_used, store.disk_used, store.get(3)
    (tensor([1., 1., 1., 1.]), 16, 12, None)
    >>> store.close()
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        format: str = "float32",
        memory_bytes: int = DEFAULT_BYTES,
        fingerprint: str = "",
        free_bytes: int = DEFAULT_BYTES,
    ) -> None:
        if format not in FORMATS:
            raise InputError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
        if memory_bytes < 0 or free_bytes < 0:
            raise InputError(
                f"memory_bytes is {memory_bytes} and free_bytes {free_bytes}; "
                "give numbers of bytes >= 0"
            )
        self.format = format
        self.damaged = 0
        self.memory_used = 0
        self._fingerprint = fingerprint
        self._memory_bytes, self._free_bytes = memory_bytes, free_bytes
        self._folder = None if folder is None else Path(folder)
        self._entries: dict[Key, Entry] = {}
        self._memory: dict[Key, Encoded] = {}
        self._file: EntryFile | None = None
        self._unsaved = 0
        self._full = False
        if self._folder is not None:
            self._open(self._folder)

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        """Whether there is an entry."""
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        """The samples that have an entry."""
        return iter(list(self._entries))

    @property
    def disk_used(self) -> int:
        """Bytes of the entries in the file."""
        return 0 if self._file is None else self._file.used

    def tag(self, key: Key) -> str | None:
        """What an entry was tagged with, or None if there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry.tag

    def put(self, key: Key, tensor: Tensor, tag: str = "") -> bool:
        """Store a tensor in place of what was there; say whether there was room.

        Raises:
            InputError: The tensor is not of a floating-point type.
        """
        self.remove(key)
        encoded = encode(tensor, self.format)
        entry = Entry(tag, tuple(tensor.shape), tensor.dtype, None)
        in_memory = self._keep(key, encoded)
        if not self._full and (self._folder is not None or not in_memory):
            entry = self._written(entry, encoded)
        if not in_memory and entry.place is None:
            return False
        self._entries[key] = entry
        self._unsaved += 1
        if self._unsaved >= max(MIN_UNSAVED, len(self._entries) // 4):
            self.flush()
        return True

    def get(self, key: Key) -> Tensor | None:
        """A new tensor on the host, or None if there is no sound entry."""
        if (entry := self._entries.get(key)) is None:
            return None
        encoded = self._memory.get(key)
        if encoded is None:
            assert self._file is not None and entry.place is not None
            data = self._file.read(entry.place)
            if data is not None:
                encoded = from_bytes(data, entry.shape, entry.dtype, self.format)
            if encoded is None:
                self._report_damage(key)
                return None
            self._keep(key, encoded)
        return decode(encoded)

    def remove(self, key: Key) -> None:
        """Forget an entry, if there is one."""
        if (entry := self._entries.pop(key, None)) is None:
            return
        if (encoded := self._memory.pop(key, None)) is not None:
            self.memory_used -= encoded.nbytes
        if self._file is not None and entry.place is not None:
            self._file.drop(entry.place)
            self._unsaved += 1
            if self._folder is None:
                self._file.settle()  # no index leads there

    def keep_first(self, count: int) -> None:
        """Forget all entries but the first `count` that were put."""
        for key in list(self._entries)[count:]:
            self.remove(key)

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()
        self._memory.clear()
        self.memory_used = 0
        self._full = False
        if self._file is not None:
            self._save_index()  # first, so that no index leads to what is gone
            self._file.clear()

    def relabel(self, fingerprint: str) -> None:
        """Say what the entries depend on from now on; the caller has removed those that do not."""
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._unsaved += 1
            self.flush()

    def flush(self) -> None:
        """Write the index of a folder that was given, so that a later run finds the entries."""
        if self._file is not None and self._unsaved and self._folder is not None:
            try:
                self._file.sync()
                self._save_index()
            except OSError as error:
                self._stop(error)

    def close(self) -> None:
        """Write the index; remove a temporary folder. The store is empty afterwards."""
        self.flush()
        if self._file is not None and self._folder is None:
            self._finalizer()
        self._entries.clear()
        self._memory.clear()
        self.memory_used = 0
        self._file = None

    def _open(self, folder: Path) -> None:
        """Take over what a folder holds, if it is sound and about the same model and data."""
        index, data = folder / INDEX, folder / DATA
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if index.exists():
                found = read_index(index, data, kind=self.format, fingerprint=self._fingerprint)
                if isinstance(found, str):
                    warn(
                        f"the cached activations in {folder} are not used: {found}; they are "
                        "computed again"
                    )
                    index.unlink()
                else:
                    self._entries = found
            places = [e.place for e in self._entries.values() if e.place is not None]
            self._file = EntryFile(data, places, self._free_bytes)
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror}; give a folder that can be written to"
            ) from error

    def _keep(self, key: Key, encoded: Encoded) -> bool:
        """Hold an entry in memory if there is room."""
        if self.memory_used + encoded.nbytes > self._memory_bytes:
            return False
        self._memory[key] = encoded
        self.memory_used += encoded.nbytes
        return True

    def _written(self, entry: Entry, encoded: Encoded) -> Entry:
        """The entry with its place in the file; without one if the disk is full."""
        try:
            if self._file is None:
                folder = tempfile.mkdtemp(prefix="rgft-activations-")
                self._finalizer = weakref.finalize(self, shutil.rmtree, folder, True)
                self._file = EntryFile(Path(folder) / DATA, [], self._free_bytes)
            return replace(entry, place=self._file.write(to_bytes(encoded)))
        except OSError as error:
            self._stop(error)
            return entry

    def _stop(self, error: OSError) -> None:
        """Write no more."""
        if not self._full:
            warn(
                f"activations can no longer be written to disk ({error.strerror}); "
                f"{len(self._entries)} samples are cached, further ones are computed each time"
            )
        self._full = True

    def _save_index(self) -> None:
        self._unsaved = 0
        if self._file is not None and self._folder is not None:
            write_index(
                self._folder / INDEX,
                self._entries,
                kind=self.format,
                fingerprint=self._fingerprint,
            )
            self._file.settle()

    def _report_damage(self, key: Key) -> None:
        self.damaged += 1
        if self.damaged == 1:
            warn(
                f"the cached activations of sample {key!r} are damaged; such samples are computed "
                "again"
            )
        self.remove(key)
