"""The residual ledger: how wrong the model still is on each sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rgft.atomic import atomic_path
from rgft.errors import TABLES_NEED, InputError
from rgft.processes import Processes
from rgft.sample_kinds import KINDS, sample_kinds
from rgft.transfer import to_host

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_IDS = "sample_ids"  # what names the samples of a batch
METADATA = b"rgft"
STATE = {
    "residual": torch.float64,
    "last": torch.float32,
    "visits": torch.int32,
    "judged": torch.int32,
    "correct": torch.int32,
    "forgotten": torch.int32,
    "was_correct": torch.bool,
}


class Ledger:
    r"""The residual (loss) of every training sample, smoothed over its visits.

    .. math:: R_i \leftarrow \ell_i \text{ at the first visit, then }
              R_i \leftarrow \beta R_i + (1 - \beta) \ell_i

    A sample that is not visited keeps its value; a sample is visited few times, so that a start at
    0, as the error map has it, would mean little. `beta=0` keeps the last loss (InfoBatch, Qin et
    al. 2024). With correctness given it also counts how often each sample was right, and how often
    it was right at one visit and wrong at the next: a forgetting event (Toneva et al. 2019).

    Losses stay on their device until `every` updates have come together or something is read; then
    they come to the host in one transfer. The ledger itself, 29 bytes a sample, lives there. A loss
    that is not finite is left out and counted in `skipped`.

    Args:
        samples: Number of samples N; they are known by their numbers 0 ... N - 1.
        beta: Smoothing, in [0, 1).
        every: Updates that are taken in together.

    >>> ledger = Ledger(3, beta=0.5)
    >>> ledger.update(torch.tensor([0, 2]), torch.tensor([4.0, 1.0]), torch.tensor([False, True]))
    >>> ledger.update(torch.tensor([2]), torch.tensor([2.0]), torch.tensor([False]))
    >>> ledger.residual.tolist(), ledger.forgotten.tolist()
    ([4.0, nan, 1.5], [0, 0, 1])
    """

    def __init__(self, samples: int, *, beta: float = 0.5, every: int = 16) -> None:
        for name, value in {"samples": samples, "every": every}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; allowed: a whole number >= 1")
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1:
            raise InputError(f"beta is {beta!r}; allowed: in [0, 1)")
        self.samples = samples
        self.beta = beta
        self.every = every
        self._state = {name: torch.zeros(samples, dtype=dtype) for name, dtype in STATE.items()}
        self._state["residual"].fill_(torch.nan)
        self._state["last"].fill_(torch.nan)
        self._skipped = 0
        self._pending: list[Tensor] = []
        self._processes: Processes | None = None

    def share(self, processes: Processes) -> None:
        """Take in the losses of all processes: each calls `update` with its own from now on.

        Every process has to call it, as often as the others, with no samples where it has none.
        """
        self._processes = processes

    def __len__(self) -> int:
        return self.samples

    @property
    def residual(self) -> Tensor:
        """Smoothed residual R, float64 `[N]` on the host; NaN where a sample was never seen."""
        return self._read("residual")

    @property
    def last(self) -> Tensor:
        """Loss at the last visit, float32 `[N]`; NaN where a sample was never seen."""
        return self._read("last")

    @property
    def visits(self) -> Tensor:
        """Visits of each sample, int32 `[N]`."""
        return self._read("visits")

    @property
    def seen(self) -> Tensor:
        """Which samples have a residual, bool `[N]`."""
        return self._read("visits") > 0

    @property
    def judged(self) -> Tensor:
        """Visits at which correctness was given, int32 `[N]`."""
        return self._read("judged")

    @property
    def correct(self) -> Tensor:
        """Visits at which the sample was right, int32 `[N]`."""
        return self._read("correct")

    @property
    def forgotten(self) -> Tensor:
        """How often a sample was right at one visit and wrong at the next, int32 `[N]`."""
        return self._read("forgotten")

    @property
    def skipped(self) -> int:
        """Losses left out because they were not finite."""
        self.flush()
        return self._skipped

    def update(self, ids: Tensor, residuals: Tensor, correct: Tensor | None = None) -> None:
        """Take in the losses of a batch. Does not wait for the device but every `every` updates.

        With several processes all ledgers have to be the same: see `share`.

        Args:
            ids: Numbers of the samples, whole, `[B]`; a repeated one counts as visits in turn.
            residuals: Their losses, `[B]`; kept in single precision.
            correct: Whether each was predicted right, bool `[B]`; None if that has no meaning.

        Raises:
            InputError: Shapes or types do not fit, or an id is out of range. Ids on a device are
                looked at when they come to the host, perhaps at a later update.
        """
        self._check(ids, residuals, correct)
        device = residuals.device
        bits = residuals.detach().to(torch.float32).view(torch.int32)  # so that all goes in one
        judged = torch.full_like(bits, -1) if correct is None else correct.to(bits)
        rows = torch.stack([ids.to(device, torch.int64), bits.long(), judged.long()])
        self._pending.append(rows if self._processes is None else self._processes.joined(rows))
        if len(self._pending) >= self.every:
            self.flush()

    def _check(self, ids: Tensor, residuals: Tensor, correct: Tensor | None) -> None:
        shapes = [tuple(t.shape) for t in (ids, residuals, correct) if t is not None]
        if residuals.ndim != 1 or len(set(shapes)) > 1:
            given = ", ".join(str(shape) for shape in shapes)
            raise InputError(
                f"ids, residuals and correctness have the shapes {given}; allowed: [B] for each, "
                "one loss a sample (reduction='none')"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids are {ids.dtype}; allowed: whole numbers, such as torch.int64")
        if correct is not None and correct.dtype != torch.bool:
            raise InputError(f"correctness is {correct.dtype}; allowed: torch.bool")
        if ids.device.type == "cpu":
            self._check_range(ids)

    def _check_range(self, ids: Tensor) -> None:
        outside = ids[(ids < 0) | (ids >= self.samples)]
        if len(outside):
            raise InputError(
                f"sample {int(outside[0])} is not in the ledger; allowed: 0 to {self.samples - 1}, "
                "the positions in the training data"
            )

    def flush(self) -> None:
        """Bring what is pending to the host, in one transfer, and take it in."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        ids, bits, correct = to_host(torch.cat(pending, dim=1))
        self._check_range(ids)
        residuals = bits.to(torch.int32).view(torch.float32)
        finite = torch.isfinite(residuals)
        self._skipped += int((~finite).sum())
        ids, residuals, correct = ids[finite], residuals[finite], correct[finite]
        for rows in rounds(ids):
            self._take(ids[rows], residuals[rows], correct[rows])

    def _take(self, ids: Tensor, residuals: Tensor, correct: Tensor) -> None:
        """One visit each of distinct samples."""
        state = self._state
        before, loss = state["residual"][ids], residuals.double()
        smoothed = self.beta * before + (1 - self.beta) * loss
        state["residual"][ids] = torch.where(before.isnan(), loss, smoothed)
        state["last"][ids] = residuals
        state["visits"][ids] += 1
        ids, right = ids[correct >= 0], correct[correct >= 0] == 1
        state["judged"][ids] += 1
        state["correct"][ids] += right.int()
        state["forgotten"][ids] += (state["was_correct"][ids] & ~right).int()
        state["was_correct"][ids] = right

    def _read(self, name: str) -> Tensor:
        """A copy, so that what a caller keeps does not change under them."""
        self.flush()
        return self._state[name].clone()

    def kinds(self) -> Tensor:
        """What kind of sample each is, as positions in `KINDS`, int64 `[N]`. See `sample_kinds`."""
        return sample_kinds(self.residual, self.visits, self.correct, self.forgotten)

    def to_pandas(self) -> pd.DataFrame:
        """The ledger as a table.

        Returns:
            One row a sample: sample (its number), residual (smoothed loss; NaN if never seen),
            visits, correct and forgotten (counts; missing where correctness was never given), kind
            (see `sample_kinds`).
        """
        try:
            import pandas as pd  # noqa: PLC0415 - an extra that the core does without
        except ImportError as missing:
            raise InputError(TABLES_NEED) from missing

        table = pd.DataFrame({"sample": range(self.samples), "residual": self.residual.numpy()})
        table["visits"] = self.visits.numpy()
        never = (self.judged == 0).numpy()
        for name in ("correct", "forgotten"):
            table[name] = pd.array(self._state[name].numpy(), dtype="Int32")
            table.loc[never, name] = pd.NA
        codes = self.kinds().numpy()
        table["kind"] = pd.Categorical.from_codes(codes, categories=pd.Index(KINDS))
        return table

    def write(self, path: str | Path) -> None:
        """Write the table of `to_pandas` as Parquet; the file appears whole or not at all."""
        try:
            import pyarrow as pa  # noqa: PLC0415
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as missing:
            raise InputError(TABLES_NEED) from missing

        table = pa.Table.from_pandas(self.to_pandas(), preserve_index=False)
        facts = json.dumps({"beta": self.beta, "skipped": self.skipped})
        table = table.replace_schema_metadata({**table.schema.metadata, METADATA: facts})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers (loads with `weights_only=True`)."""
        self.flush()
        copies = {name: values.clone() for name, values in self._state.items()}
        return {**copies, "skipped": self._skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; what was pending is dropped.

        Raises:
            InputError: It is of a ledger of another size.
        """
        if len(state["residual"]) != self.samples:
            raise InputError(
                f"the saved ledger has {len(state['residual'])} samples, this one {self.samples}; "
                "resume with the data that the run was begun with"
            )
        self._pending.clear()
        self._state = {name: state[name].to("cpu", dtype).clone() for name, dtype in STATE.items()}
        self._skipped = int(state["skipped"])


def rounds(ids: Tensor) -> Iterator[Tensor]:
    """Positions of first occurrences, then of second ones, and so on: distinct ids in each.

    >>> [rows.tolist() for rows in rounds(torch.tensor([7, 5, 7, 7, 5]))]
    [[0, 1], [2, 4], [3]]
    """
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    occurrence = torch.empty_like(order)
    occurrence[order] = torch.arange(len(ids)) - torch.searchsorted(ordered, ordered)
    by_round = torch.argsort(occurrence, stable=True)
    yield from torch.split(by_round, torch.bincount(occurrence).tolist())
