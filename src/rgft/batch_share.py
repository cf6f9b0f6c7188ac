"""The part of a batch that one of several processes trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgft.errors import InputError


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of a batch of `whole` rows that are those of one process of `size`.

    Attributes:
        start: The first of them.
        stop: One after the last.
        whole: Rows of the batch.
        size: Processes.
    """

    start: int
    stop: int
    whole: int
    size: int

    @property
    def idle(self) -> bool:
        """Whether there is nothing here; a process then runs a row that counts for nothing."""
        return self.start == self.stop

    def weight(self, counts: Sequence[int] | None = None) -> float:
        """What to multiply a mean over the rows by, so that processes average to the whole mean.

        Args:
            counts: How much each row of the whole batch counts in a mean; None for all alike.
        """
        if counts is None:
            return self.size * (self.stop - self.start) / self.whole
        return self.size * sum(counts[self.start : self.stop]) / sum(counts)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Its rows, padded as the whole batch is; one row where there are none."""
        rows = slice(0, 1) if self.idle else slice(self.start, self.stop)
        return {name: values[rows] for name, values in batch.items()}


def share(whole: int, rank: int, size: int) -> Share:
    """The rows of process `rank`: shares follow each other, and differ by one row at most.

    >>> [(part.start, part.stop) for part in (share(5, rank, 2) for rank in range(2))]
    [(0, 3), (3, 5)]
    >>> share(5, 0, 2).weight() / 2 + share(5, 1, 2).weight() / 2
    1.0
    >>> share(3, 0, 2).weight([1, 1, 6]), share(3, 1, 2).weight([1, 1, 6])
    (0.5, 1.5)
    """
    least, more = divmod(whole, size)
    start = rank * least + min(rank, more)
    return Share(start, start + least + (rank < more), whole, size)


def check_divides(batch_size: int, processes: int) -> None:
    """Refuse batches that cannot be shared out evenly.

    Raises:
        InputError: They cannot.
    """
    if batch_size % processes:
        below = batch_size // processes * processes
        raise InputError(
            f"a batch of {batch_size} cannot be shared out evenly to {processes} processes; give "
            f"--batch-size {' or '.join(str(n) for n in (below, below + processes) if n)}"
        )
