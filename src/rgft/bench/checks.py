"""What the cells of a suite name, looked at once before the first of them runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rgft.bench.cells import Cell
from rgft.errors import InputError
from rgft.inputs import load_inputs
from rgft.models import check_modality, writes_as
from rgft.progress import waiting
from rgft.run_samples import load_data
from rgft.spec import RunSpec
from rgft.tasks import TASKS, TaskData

DATA = (
    *("task", "data", "text_columns", "label_column", "target_column"),
    *("max_train_rows", "max_evaluation_rows"),
)
INPUTS = (
    *("model", "max_length", "image_size", "group_by_length"),
    *("prompt", "max_target_length", "beams", "written_rows"),
)
Loaded = dict[tuple[Any, ...], TaskData]


def check_places(cells: Iterable[Cell]) -> None:
    """Load the data, and what turns it into batches of the models, each once.

    Of a named task that is not on this machine only the kind is looked at; weights are not read.

    Raises:
        InputError: A model, a data folder or a column is not there, or they do not go together.
    """
    loaded: Loaded = {}
    seen: set[tuple[Any, ...]] = set()
    for cell in cells:
        combination = _values(cell.spec, DATA + INPUTS)
        if combination not in seen:
            seen.add(combination)
            try:
                with waiting("looking at the models and the data"):
                    _check(cell.spec, loaded)
            except InputError as error:
                raise InputError(
                    f"arm {cell.labels['arm']} on {cell.labels['task']}: {error}"
                ) from error


def _check(spec: RunSpec, loaded: Loaded) -> None:
    entry = None if spec.task is None else TASKS[spec.task]
    if entry is not None and spec.data is None and not entry.available():
        if entry.kind == "generation":
            writes_as(spec.model, str(spec.task))
        else:
            check_modality(spec.model, entry.modality, str(spec.task))
        return
    key = _values(spec, DATA)
    if key not in loaded:
        loaded[key] = load_data(spec)
    load_inputs(spec, loaded[key])


def _values(spec: RunSpec, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(getattr(spec, name) for name in names)
