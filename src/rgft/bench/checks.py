"""What the cells of a suite name, looked at once before the first of them runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rgft.bench.cells import Cell
from rgft.bench.suite import in_suite
from rgft.errors import InputError
from rgft.forgetting import check_forgetting, load_ability
from rgft.inputs import load_inputs
from rgft.models import check_modality, writes_as
from rgft.progress import waiting
from rgft.run_samples import load_data
from rgft.spec import RunSpec
from rgft.tasks import TASKS, TaskData

OF_DATA = (
    *("task", "data", "text_columns", "label_column", "target_column"),
    *("max_train_rows", "max_evaluation_rows"),
)
OF_INPUTS = (
    *("model", "max_length", "image_size", "group_by_length"),
    *("prompt", "max_target_length", "beams", "written_rows", "forgetting"),
)


def check_places(cells: Iterable[Cell]) -> list[str]:
    """Load the data, and what turns it into batches of the models, each once.

    Of a named task that is not on this machine only the kind is looked at; weights are not read.

    Returns:
        Names of the tasks that are not on this machine, so that a cell has to fetch them.

    Raises:
        InputError: A model, a data folder or a column is not there, or they do not go together.
    """
    of_data: dict[tuple[Any, ...], dict[tuple[Any, ...], Cell]] = {}
    absent: dict[str, None] = {}
    for cell in cells:
        alike = of_data.setdefault(_values(cell.spec, OF_DATA), {})
        alike.setdefault(_values(cell.spec, OF_INPUTS), cell)
    for alike in of_data.values():
        task: TaskData | None = None
        for cell in alike.values():
            try:
                with waiting("looking at the models and the data"):
                    task = _check(cell.spec, task)
                if task is None:
                    absent[str(cell.spec.task)] = None
            except InputError as error:
                where = f"arm {cell.labels['arm']} on {cell.labels['task']}"
                raise InputError(f"{where}: {in_suite(str(error))}") from error
    return list(absent)


def _check(spec: RunSpec, task: TaskData | None) -> TaskData | None:
    """Look at one, with its data if that is loaded; the data."""
    entry = None if spec.task is None else TASKS[spec.task]
    if entry is not None and spec.data is None and not entry.available():
        if entry.kind == "generation":
            writes_as(spec.model, str(spec.task))
        else:
            check_modality(spec.model, entry.modality, str(spec.task))
        if spec.forgetting:
            check_forgetting(spec, entry.modality)
        return None
    if task is None:
        task = load_data(spec)
    inputs = load_inputs(spec, task)
    if spec.forgetting:
        load_ability(spec, task, inputs)
    return task


def _values(spec: RunSpec, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(getattr(spec, name) for name in names)
