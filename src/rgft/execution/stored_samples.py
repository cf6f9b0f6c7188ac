"""Activations of samples at a boundary: which a batch can use, and where they come from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rgft.activations import ActivationStore, Key
from rgft.errors import warn
from rgft.execution.prefix_batch import Samples

Rows = dict[int, dict[int, Tensor]]  # samples by depth and by position in the batch


@dataclass(frozen=True, slots=True)
class Storage:
    """Where activations are kept, and how.

    Attributes:
        folder: For a later run to find them; None for a temporary folder.
        format: "float32", "bfloat16" or "int8".
        memory_bytes: Bound for those in memory; the rest is in the folder.
        free_bytes: Room on the disk that is left to others.
        data: What they depend on besides the model: a fingerprint of the data.
    """

    folder: str | Path | None = None
    format: str = "float32"
    memory_bytes: int = 2**30
    free_bytes: int = 2**30
    data: str = ""

    def open(self, folder: str | Path | None, fingerprint: str = "") -> ActivationStore:
        """A store with these settings."""
        return ActivationStore(
            folder,
            format=self.format,
            memory_bytes=self.memory_bytes,
            free_bytes=self.free_bytes,
            fingerprint=fingerprint,
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The batch in which a sample was computed: its number, size and padded length."""

    serial: int
    size: int
    length: int


class StoredSamples:
    """Samples in a store, each at the boundary at which it was computed.

    Args:
        storage: Settings of the store. A given folder is opened by the first `label`.

    Attributes:
        changed: Samples whose input was not the one that had been stored.
        seconds: Time spent on storing and finding.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.store = storage.open(None)
        self.changed = 0
        self.seconds = 0.0
        self._label: str | None = None
        self._origins: dict[Key, Origin] = {}
        self._serial = 0

    def label(self, label: str) -> None:
        """Say what the entries of a given folder depend on."""
        if self.storage.folder is None or label == self._label:
            return
        if self._label is None:
            self.store = self.storage.open(self.storage.folder, label)
        else:
            self.store.relabel(label)
        self._label = label

    def drop_above(self, boundary: int) -> None:
        """Forget what was computed at deeper boundaries."""
        for key in self.store:
            if self._depth(key) > boundary:
                self.store.remove(key)

    def usable(self, samples: Samples, precision: str) -> list[int]:
        """The boundary at which each sample is stored; 0 if it is not, or differs by now."""
        depths = [self._depth(key) for key in samples.ids]
        for row, (key, depth) in enumerate(zip(samples.ids, depths, strict=True)):
            if depth and self.store.tag(key) != _tag(depth, samples, row, precision):
                self._report_change(key)
                depths[row] = 0
        return depths

    def find(self, samples: Samples, depths: list[int]) -> Rows | None:
        """Every sample of a batch, or None if one of them is damaged."""
        begun = time.perf_counter()
        rows: Rows = {}
        for row, (key, depth) in enumerate(zip(samples.ids, depths, strict=True)):
            if (tensor := self.store.get(key)) is None:
                return None
            rows.setdefault(depth, {})[row] = tensor
        self.seconds += time.perf_counter() - begun
        return rows

    def keep(
        self, samples: Samples, rows: dict[int, Tensor], boundary: int, precision: str
    ) -> None:
        """Store samples of a batch by their position in it."""
        begun = time.perf_counter()
        self._serial += 1
        origin = Origin(self._serial, len(samples.ids), samples.length)
        for row, tensor in rows.items():
            key, tag = samples.ids[row], _tag(boundary, samples, row, precision)
            # stored ones are computed again where the batch has a new one
            if self.store.tag(key) != tag and self.store.put(key, tensor, tag):
                self._origins[key] = origin
        self.seconds += time.perf_counter() - begun

    def origins(self, samples: Samples) -> set[Origin | None]:
        """The batches that the samples of a batch come from; None for an earlier run."""
        return {self._origins.get(key) for key in samples.ids}

    def state_dict(self) -> dict[str, Any]:
        """What the folder does not say; it is complete after a `flush` of the store."""
        return {
            "entries": len(self.store),
            "serial": self._serial,
            "origins": {k: (o.serial, o.size, o.length) for k, o in self._origins.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go back to where `state_dict` was taken; whether all entries of then are there."""
        self.store.keep_first(int(state["entries"]))
        self._serial = int(state["serial"])
        self._origins = {key: Origin(*values) for key, values in state["origins"].items()}
        return len(self.store) == int(state["entries"])

    def _depth(self, key: Key) -> int:
        tag = self.store.tag(key)
        return 0 if tag is None else int(tag.partition(" ")[0])

    def _report_change(self, key: Key) -> None:
        self.changed += 1
        if self.changed == 1:
            warn(
                f"sample {key!r} is not what it was when its activations were stored "
                "(augmentation, dynamic masking, another precision, or an id that is not unique); "
                "such samples are computed again"
            )


def _tag(boundary: int, samples: Samples, row: int, precision: str) -> str:
    """What an entry is of."""
    return f"{boundary} {precision} {samples.contents[row]}"
