"""The error map: an exponential moving average of every component's score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rgft.atomic import atomic_path
from rgft.components import Component
from rgft.errors import TABLES_NEED, InputError
from rgft.history import COLUMNS, History
from rgft.transfer import to_host

if TYPE_CHECKING:
    import pandas as pd

METADATA = b"rgft"


class ErrorMap:
    r"""How much each component contributes to the loss, smoothed over steps.

    .. math:: E_k \leftarrow \beta E_k + (1 - \beta) s_k, \qquad E_k(0) = 0

    A component without a score at some step (it was frozen) keeps its value. With bias correction
    the map is :math:`E_k / (1 - \beta^{t_k})` where :math:`t_k` counts the scores it has had, as in
    Adam. A score that is not finite is left out and counted in `skipped`.

    Args:
        components: The partition.
        beta: Smoothing, in [0, 1).
        bias_correction: Whether `values` is corrected for the start at 0.
        device: Where the map lives.
        dtype: Precision it is kept in.
        history_rows: Most steps of the history that are kept (see `History`).

    >>> parts = [Component("a", "layer", 0, (), 1), Component("b", "layer", 1, (), 1)]
    >>> error_map = ErrorMap(parts, beta=0.5)
    >>> error_map.update(torch.tensor([4.0, 8.0]))
    >>> error_map.update(torch.tensor([0.0, 8.0]), observed=torch.tensor([False, True]))
    >>> error_map.values.tolist()
    [2.0, 6.0]
    """

    def __init__(  # noqa: PLR0913 - all but two have defaults
        self,
        components: Sequence[Component],
        beta: float,
        *,
        bias_correction: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        history_rows: int = 1000,
    ) -> None:
        self.components = tuple(components)
        self.beta = beta
        self.bias_correction = bias_correction
        self.history = History(len(self.components), history_rows)
        size = len(self.components)
        self._raw = torch.zeros(size, device=device, dtype=dtype)
        self._count = torch.zeros(size, device=device, dtype=dtype)
        self._last = torch.full((size,), torch.nan, device=device, dtype=dtype)
        self._skipped = torch.zeros((), device=device, dtype=dtype)
        self._pending: list[tuple[int, Tensor, tuple[float, ...]]] = []

    @property
    def values(self) -> Tensor:
        """The map E, `[K]`, on the device."""
        if not self.bias_correction:
            return self._raw
        if self.beta == 0:
            return self._raw
        correction = -torch.expm1(self._count * math.log(self.beta))  # 1 - beta^t, exact near 0
        return torch.where(self._count > 0, self._raw / correction, self._raw)

    def update(
        self, scores: Tensor, observed: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Take in the scores `[K]` of one step. Does not wait for the device.

        Args:
            scores: One per component, >= 0; entries not observed are ignored.
            observed: Which components have a score, bool `[K]`; None for all.
            valid: Bool scalar; False (a step that gradient scaling rejected) leaves the map alone.
        """
        scores = scores.to(self._raw)
        seen = torch.ones_like(scores, dtype=torch.bool) if observed is None else observed
        if valid is not None:
            seen = seen & valid
        taken = seen & torch.isfinite(scores)
        smoothed = self.beta * self._raw + (1 - self.beta) * scores
        self._raw = torch.where(taken, smoothed, self._raw)
        self._last = torch.where(taken, scores, torch.nan)
        self._count = self._count + taken
        self._skipped = self._skipped + (seen & ~taken).any()

    def record(self, step: int, lr_scale: tuple[float, ...]) -> None:
        """Remember the state after `step` for the history. Does not wait for the device."""
        if self.history.keeps(step):
            seen = torch.where(self._count > 0, self.values, torch.nan)
            self._pending.append((step, torch.stack([self._last, seen]), lr_scale))
        if len(self._pending) >= self.history.limit:
            self.flush()  # long stretches without a decision: the memory stays bounded

    def flush(self, extra: Tensor | None = None) -> tuple[Tensor, int, Tensor]:
        """Bring the map to the host in one transfer, with all rows pending for the history.

        Args:
            extra: Small numbers on the device that come along in the same transfer.

        Returns:
            The map E, float64 `[K]`; how many steps so far had a score that was not finite;
            `extra` on the host.
        """
        rows = [row.flatten() for _, row, _ in self._pending]
        more = self._raw.new_empty(0) if extra is None else extra.to(self._raw)
        flat = to_host(torch.cat([more, self.values, self._skipped.reshape(1), *rows]))
        more, flat = flat[: len(more)], flat[len(more) :]
        size = len(self.components)
        recorded = flat[size + 1 :].float().numpy().reshape(-1, 2, size)
        for (step, _, lr_scale), row in zip(self._pending, recorded, strict=True):
            scale = np.asarray(lr_scale, dtype=np.float32)
            self.history.append(step, np.concatenate([row, scale[None]]))
        self._pending.clear()
        return flat[:size].double(), int(flat[size]), more

    def to_pandas(self) -> pd.DataFrame:
        """The history as a tidy table.

        Returns:
            Columns step, component, kind, depth, score (NaN: not observed), error (E; NaN: never
            observed so far), lr_scale (0: frozen); one row per kept step and component. Use
            `.pivot(index="step", columns="component", values="error")` for a matrix.
        """
        try:
            import pandas as pd  # noqa: PLC0415 - an extra that the core does without
        except ImportError as missing:
            raise InputError(TABLES_NEED) from missing

        self.flush()
        count, size = len(self.history), len(self.components)
        component = np.tile(np.arange(size), count)

        def per_component(values: Sequence[Any]) -> Any:
            return np.asarray(values)[component]

        table = pd.DataFrame({"step": np.repeat(self.history.steps, size)})
        categories = pd.Index([c.name for c in self.components])
        table["component"] = pd.Categorical.from_codes(component, categories=categories)
        table["kind"] = pd.Categorical(per_component([c.kind for c in self.components]))
        table["depth"] = per_component([c.depth for c in self.components])
        for column in COLUMNS:
            table[column] = self.history.column(column).ravel()
        return table

    def to_parquet(self, path: str | Path) -> None:
        """Write the table of `to_pandas`, and what `from_parquet` needs, to one file."""
        try:
            import pyarrow as pa  # noqa: PLC0415
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as missing:
            raise InputError(TABLES_NEED) from missing

        table = pa.Table.from_pandas(self.to_pandas(), preserve_index=False)
        facts = {
            "beta": self.beta,
            "bias_correction": self.bias_correction,
            "history_rows": self.history.limit,
            "stride": self.history.stride,
            "components": [[c.name, c.kind, c.depth, c.numel] for c in self.components],
            "dtype": str(self._raw.dtype).removeprefix("torch."),
            "raw": self._raw.tolist(),
            "count": self._count.tolist(),
            "skipped": float(self._skipped),
        }
        table = table.replace_schema_metadata(
            {**table.schema.metadata, METADATA: json.dumps(facts)}
        )
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def from_parquet(cls, path: str | Path) -> ErrorMap:
        """The map that `to_parquet` wrote (its components know their size, not their slices).

        Raises:
            InputError: The file is missing, damaged or not an error map.
        """
        try:
            import pyarrow as pa  # noqa: PLC0415
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as missing:
            raise InputError(TABLES_NEED) from missing

        try:
            table = pq.read_table(path)
            return cls._from_table(table, json.loads(table.schema.metadata[METADATA]))
        except (
            OSError,
            pa.ArrowException,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{path} is not an error map that rgft wrote: {reason}") from error

    @classmethod
    def _from_table(cls, table: Any, facts: dict[str, Any]) -> ErrorMap:
        """The map from the columns and the metadata of a Parquet table."""
        parts = [
            Component(name, kind, depth, (), numel)
            for name, kind, depth, numel in facts["components"]
        ]
        dtype = {"float32": torch.float32, "float64": torch.float64}[facts["dtype"]]
        result = cls(
            parts,
            facts["beta"],
            bias_correction=facts["bias_correction"],
            dtype=dtype,
            history_rows=facts["history_rows"],
        )
        result._raw = torch.tensor(facts["raw"], dtype=dtype)
        result._count = torch.tensor(facts["count"], dtype=dtype)
        result._skipped = torch.tensor(facts["skipped"], dtype=dtype)
        columns = [table[c].to_numpy().reshape(-1, len(parts)) for c in COLUMNS]
        rows = torch.from_numpy(np.stack(columns, axis=1))
        steps = torch.from_numpy(table["step"].to_numpy()[:: len(parts)].copy())
        result.history.load_state_dict({"stride": facts["stride"], "steps": steps, "rows": rows})
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers (loads with `weights_only=True`)."""
        self.flush()
        state = {
            name: to_host(getattr(self, f"_{name}")) for name in ("raw", "count", "last", "skipped")
        }
        return {**state, "history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name in ("raw", "count", "last", "skipped"):
            current: Tensor = getattr(self, f"_{name}")
            setattr(self, f"_{name}", state[name].to(current))
        self.history.load_state_dict(state["history"])
        self._pending.clear()
