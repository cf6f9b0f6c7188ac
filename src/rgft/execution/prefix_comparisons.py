"""In which ways a prefix cache has been found exact for its model."""

from __future__ import annotations

import math
from collections.abc import Set

from rgft.execution.prefix_batch import Samples
from rgft.execution.stored_samples import StoredSamples

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "int8": 5e-2}
HALF_TOLERANCE = 3e-2  # of computation in 16 bits, whose rounding depends on the batch
REASONS = {
    "structure": "although nothing else changed: the model uses more of its first layers than the "
    "hidden states of the last one",
    "batching": "when samples are batched anew: they influence each other in the frozen layers",
    "padding": "when samples are padded anew: positions are counted through the padding",
}


class Comparisons:
    """What comparisons of outputs with and without the cache have shown.

    Args:
        format: In which activations are stored: what is allowed to differ depends on it.

    Attributes:
        passed: The ways in which stored batches have differed without harm, keys of `REASONS`.
    """

    def __init__(self, format: str) -> None:
        self.passed: set[str] = set()
        self._tolerance = TOLERANCE[format]

    def forget(self) -> None:
        """Compare anew: the prefix is another one."""
        self.passed.clear()

    def untested(self, samples: Samples, stored: StoredSamples) -> set[str]:
        """In which ways a stored batch differs from those that were compared so far."""
        origins = stored.origins(samples)
        aspects = {"structure"}
        if len(origins) > 1 or any(o is None or o.size != len(samples.ids) for o in origins):
            aspects.add("batching")
        if samples.mask is not None and any(
            o is None or o.length != samples.length for o in origins
        ):
            aspects.add("padding")
        return aspects - self.passed

    def judge(self, aspects: Set[str], apart: float, *, half: bool) -> str | None:
        """Why the cache cannot be used, if the outputs of a batch are too far apart.

        Args:
            aspects: In which ways the batch is the first one.
            apart: Relative difference; not-a-number for a broken model, which tells nothing.
            half: Whether the model computes in 16 bits.
        """
        allowed = max(self._tolerance, HALF_TOLERANCE) if half else self._tolerance
        if math.isnan(apart):
            return None
        if apart <= allowed:
            self.passed |= aspects
            return None
        reasons = [REASONS[name] for name in REASONS if name in aspects]
        return (
            "the prefix cache is not exact for this model: with it the outputs differ by "
            f"{apart:.1e} (relative; {allowed:.0e} is allowed) {', or '.join(reasons)}"
        )
