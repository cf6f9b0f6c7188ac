"""The error map of a run as matrices: components x steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rgft.errors import InputError

Floats = npt.NDArray[np.float32]

COLUMN_TYPES: Mapping[str, str] = {
    "step": "integer",
    "component": "string",
    "kind": "string",
    "depth": "integer",
    "score": "float",
    "error": "float",
    "lr_scale": "float",
}


@dataclass(frozen=True, slots=True)
class ErrorGrid:
    """The error map over time, components in forward order (embeddings first).

    Attributes:
        steps: Recorded optimizer steps, ascending; ``[T]``.
        names: Component names; ``K`` of them.
        kinds: Kind of each component; ``K``.
        depths: Depth of each component, ascending; ``K``.
        error: Smoothed scores E_k; ``[K, T]``, NaN where no finite one was recorded.
        lr_scale: Multipliers on the scheduled learning rate; ``[K, T]``, 0 is frozen, NaN as above.
    """

    steps: npt.NDArray[np.int64]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    depths: tuple[int, ...]
    error: Floats
    lr_scale: Floats

    @property
    def frozen(self) -> npt.NDArray[np.bool_]:
        """Where a component took no update; ``[K, T]``."""
        return np.equal(self.lr_scale, 0)

    @property
    def share(self) -> Floats:
        r"""Error of a component as a share of the step's total.

        $$ E_k / \sum_j E_j $$

        Shape ``[K, T]``; NaN where the component, or the whole step, has no error.
        """
        total = np.nansum(self.error, axis=0, keepdims=True)
        out = np.full_like(self.error, np.nan)
        np.divide(self.error, total, out=out, where=total > 0)
        return out

    def thinned(self, columns: int) -> ErrorGrid:
        """At most `columns` steps, evenly spaced, the first and the last among them."""
        count = len(self.steps)
        if count <= columns:
            return self
        keep = np.unique(np.linspace(0, count - 1, columns).round().astype(np.int64))
        return ErrorGrid(
            steps=self.steps[keep],
            names=self.names,
            kinds=self.kinds,
            depths=self.depths,
            error=self.error[:, keep],
            lr_scale=self.lr_scale[:, keep],
        )


def load_grid(path: Path) -> ErrorGrid | None:
    """Reads `error_map.parquet`.

    Args:
        path: The file; columns step, component, kind, depth, score, error, lr_scale.

    Returns:
        The map, or None where the table has no rows.

    Raises:
        InputError: The file is missing, is not Parquet, or holds another table.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name a folder that `rgft train` wrote")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{path} cannot be read as Parquet ({reason}); it is damaged, train the run again"
        ) from error
    _check_columns(path, table)
    return _pivot(path, table) if table.num_rows else None


def _check_columns(path: Path, table: Any) -> None:
    for name, wanted in COLUMN_TYPES.items():
        if name not in table.column_names:
            found = ", ".join(table.column_names) or "none"
            raise InputError(
                f'{path} has no column "{name}" (found: {found}); '
                f"an error map has {', '.join(COLUMN_TYPES)}"
            )
        column = table.column(name)
        # writers lose the types of a table without rows
        if table.num_rows and not _is_of_type(column.type, wanted):
            raise InputError(
                f'{path}: column "{name}" is {column.type} where {wanted} is needed; '
                "the file is damaged, train the run again"
            )
        if wanted != "float" and column.null_count:
            raise InputError(
                f'{path}: column "{name}" has {column.null_count} empty cells; '
                "the file is damaged, train the run again"
            )


def _is_of_type(found: Any, wanted: str) -> bool:
    if wanted == "integer":
        return bool(pa.types.is_integer(found))
    if wanted == "float":
        return bool(pa.types.is_floating(found))
    value = found.value_type if pa.types.is_dictionary(found) else found
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))


def _pivot(path: Path, table: Any) -> ErrorGrid:
    """From one row per (step, component) to matrices in forward order."""
    columns = {name: table.column(name).to_numpy() for name in COLUMN_TYPES}
    steps, column_of = np.unique(columns["step"], return_inverse=True)
    names, first, label = np.unique(
        columns["component"].astype(str), return_index=True, return_inverse=True
    )
    # within a depth, the order in which the run wrote them is the forward order
    forward = np.lexsort((first, columns["depth"][first]))
    row_of = np.argsort(forward)[label]
    _check_unique(path, row_of * len(steps) + column_of)
    first = first[forward]
    return ErrorGrid(
        steps=steps.astype(np.int64),
        names=tuple(names[forward].tolist()),
        kinds=tuple(str(kind) for kind in columns["kind"][first]),
        depths=tuple(int(depth) for depth in columns["depth"][first]),
        error=_matrix(columns["error"], row_of, column_of),
        lr_scale=_matrix(columns["lr_scale"], row_of, column_of),
    )


def _check_unique(path: Path, cells: npt.NDArray[np.int64]) -> None:
    repeated = len(cells) - len(np.unique(cells))
    if repeated:
        raise InputError(
            f"{path} holds {repeated} rows whose step and component occur already; "
            "it must hold one run only, train it again into an empty folder"
        )


def _matrix(
    values: npt.NDArray[Any], row_of: npt.NDArray[np.int64], column_of: npt.NDArray[np.int64]
) -> Floats:
    matrix = np.full((int(row_of.max()) + 1, int(column_of.max()) + 1), np.nan, dtype=np.float32)
    matrix[row_of, column_of] = np.where(np.isfinite(values), values, np.nan)
    return matrix
