"""What a prefix cache has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a prefix cache has done so far.

    Attributes:
        hits: Samples for which no layer of the prefix ran.
        extended: Samples for which only the layers above a shallower boundary ran.
        misses: Samples for which the whole prefix ran.
        changed: Of the misses, samples whose input was not the one that had been stored.
        checks: Batches on which outputs with and without the cache were compared; each cost two
            forward passes.
        samples: Entries now.
        memory_bytes: Their size in memory.
        disk_bytes: Their size in the file.
        seconds: Time spent on storing and finding.
    """

    hits: int
    extended: int
    misses: int
    changed: int
    checks: int
    samples: int
    memory_bytes: int
    disk_bytes: int
    seconds: float
