"""The course of the error map over steps, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
COLUMNS = ("score", "error", "lr_scale")


class History:
    """Scores, error map and multipliers at evenly spaced steps.

    Holds at most `limit` rows: when they are full every second one is dropped and the stride
    doubles, so that 100,000 steps of 500 components cost 6 MB at the default of 1,000 rows.

    Args:
        size: Number of components.
        limit: Most rows that are kept, at least 2.

    >>> history = History(size=1, limit=4)
    >>> for step in range(10):
    ...     history.append(step, np.full((3, 1), step, np.float32))
    >>> history.steps.tolist()
    [0, 4, 8]
    """

    def __init__(self, size: int, limit: int = 1000) -> None:
        self.limit = limit
        self.stride = 1
        self._steps: list[int] = []
        self._rows: list[Rows] = []
        self._size = size

    def __len__(self) -> int:
        return len(self._steps)

    def keeps(self, step: int) -> bool:
        """Whether a row for `step` would be kept."""
        return step % self.stride == 0

    def append(self, step: int, row: Rows) -> None:
        """Add the row of one step, `[3, K]` as in `COLUMNS`, if it falls on the stride."""
        if not self.keeps(step):
            return
        self._steps.append(step)
        self._rows.append(row)
        if len(self._steps) >= self.limit:
            self.stride *= 2
            kept = [i for i, s in enumerate(self._steps) if self.keeps(s)]
            self._steps = [self._steps[i] for i in kept]
            self._rows = [self._rows[i] for i in kept]

    @property
    def steps(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Steps of the rows, `[R]`."""
        return np.asarray(self._steps, dtype=np.int64)

    def column(self, name: str) -> Rows:
        """One of `COLUMNS` over steps and components, `[R, K]`."""
        index = COLUMNS.index(name)
        if not self._rows:
            return np.zeros((0, self._size), np.float32)
        return np.stack([row[index] for row in self._rows])

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        rows: Tensor = torch.zeros(0, len(COLUMNS), self._size)
        if self._rows:
            rows = torch.from_numpy(np.stack(self._rows))
        return {"stride": self.stride, "steps": torch.from_numpy(self.steps), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.stride = int(state["stride"])
        self._steps = [int(step) for step in state["steps"].tolist()]
        self._rows = list(state["rows"].numpy().copy())
