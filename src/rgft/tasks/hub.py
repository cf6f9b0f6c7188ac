"""Tasks in their schema on the Hugging Face hub: a local folder where there is one, or the hub."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from rgft.errors import InputError
from rgft.tasks.answers import check_answers, with_whole_texts
from rgft.tasks.columns import require_column
from rgft.tasks.folder import FILE_NAMES, read_folder
from rgft.tasks.images import check_images
from rgft.tasks.labels import LabelScheme, encode_labels
from rgft.tasks.splitting import with_validation
from rgft.tasks.tables import Table, one_line
from rgft.tasks.task import Input, Kind, Modality, TaskData, split_in_memory
from rgft.tasks.texts import check_texts

DATA_VARIABLE = "RGFT_DATA"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTask:
    """A task on the hub.

    Attributes:
        name: Its name here.
        description: One line.
        path: Repository of the data set on the hub.
        config: Which of its configurations; None for its only one.
        revision: Branch to load; None for the main one.
        folders: Where it may lie under the folder that `RGFT_DATA` names, first found first.
        input_columns: Columns of texts, or of images.
        label_column: Column of class numbers, of values, or of texts to write.
        label_names: Class names in the order of their numbers; empty for other kinds.
        metric: Headline metric.
        kind: "classification", "regression" or "generation".
        prompt: For generation: what a model reads, with the input columns in braces.
        modality: "text" or "image".
        directory: Folder within the revision that holds the configuration's tables, where the
            revision does not name configurations (those that the hub converts to Parquet).
        rendered: Input columns that are made of others: by name a text with {column} in it.
        splits: Names of a split in files and on the hub, by what it is called here.
    """

    name: str
    description: str
    path: str
    config: str | None = None
    revision: str | None = None
    folders: tuple[str, ...]
    input_columns: tuple[str, ...]
    label_column: str = "label"
    label_names: tuple[str, ...] = ()
    metric: str = "accuracy"
    kind: Kind = "classification"
    modality: Modality = "text"
    prompt: str | None = None
    directory: str | None = None
    rendered: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FILE_NAMES)


def load_hub_task(task: HubTask, data: Path | None = None) -> TaskData:
    """Load `task` from the folder `data`, else from under `RGFT_DATA`, else from the hub.

    A test split without labels (GLUE's are hidden) is left out. Without a validation split, a
    tenth of the training rows takes its place.

    Raises:
        InputError: It is in none of the three places, or is not what its schema says.
    """
    tables, source = tables_of(task, data)
    return from_tables(task, tables, source)


def tables_of(task: HubTask, data: Path | None = None) -> tuple[Mapping[str, Table], str]:
    """The tables of a task by split, and where they come from; see `load_hub_task`."""
    folder = data if data is not None else local_folder(task)
    tables = _from_hub(task) if folder is None else read_folder(folder, task.splits)
    return tables, str(folder or task.path)


def from_tables(task: HubTask, tables: Mapping[str, Table], source: str) -> TaskData:
    """The task from its tables by split.

    Raises:
        InputError: They are not what its schema says.
    """
    splits = {
        name: encode(task, table)
        for name, table in tables.items()
        if not (name == "test" and _is_unlabelled(task, table))
    }
    return of_splits(task, with_validation(splits, task.input_columns, task.label_column, source))


def of_splits(task: HubTask, splits: Mapping[str, datasets.Dataset]) -> TaskData:
    """The task with splits as `encode` makes them."""
    return TaskData(
        name=task.name,
        kind=task.kind,
        input_columns=task.input_columns,
        label_column=task.label_column,
        label_names=task.label_names,
        metric=task.metric,
        splits=splits,
        modality=task.modality,
        prompt=task.prompt,
    )


def local_folder(task: HubTask) -> Path | None:
    """The task's folder under the one that `RGFT_DATA` names, if it is there."""
    root = os.environ.get(DATA_VARIABLE)
    if root and not Path(root).is_dir():
        raise InputError(
            f"{DATA_VARIABLE} names {root}, which is no folder; set it to one, or unset it"
        )
    folders = [Path(root, folder) for folder in task.folders] if root else []
    return next((folder for folder in folders if folder.is_dir()), None)


def is_available(task: HubTask) -> bool:
    """Whether the task can be loaded without the network."""
    return local_folder(task) is not None or _is_cached(task)


def _is_cached(task: HubTask) -> bool:
    cached = Path(datasets.config.HF_DATASETS_CACHE, task.path.replace("/", "___"))
    if task.directory is None:
        return (cached / (task.config or "default")).is_dir()
    # folders of the cache do not say which directory they are of: the columns do
    wanted = {*_sources(task), task.label_column}
    infos = cached.glob("*/*/*/dataset_info.json")
    return any(wanted <= json.loads(info.read_text())["features"].keys() for info in infos)


def _sources(task: HubTask) -> list[str]:
    """The columns that the inputs are made of."""
    if not task.rendered:
        return list(task.input_columns)
    found = [string.Formatter().parse(template) for template in task.rendered.values()]
    return list(dict.fromkeys(name for parts in found for _, name, _, _ in parts if name))


def _from_hub(task: HubTask) -> Mapping[str, Table]:
    try:
        loaded = datasets.load_dataset(
            task.path, task.config, data_dir=task.directory, revision=task.revision
        )
        if task.modality == "image":  # bytes of files, as they are stored
            loaded = loaded.cast_column(task.input_columns[0], datasets.Image(decode=False))
    # the hub's client, its transport and the data library raise unrelated families of errors
    except Exception as problem:
        folders = " or ".join(f"${DATA_VARIABLE}/{folder}" for folder in task.folders)
        raise InputError(
            f"task {task.name!r} is not on this machine and cannot be fetched from the hub "
            f"({type(problem).__name__}: {one_line(problem, 80)}); go online, or put train, "
            f"validation and test as JSONL, CSV or Parquet into {folders}"
        ) from problem
    return {
        name: _table(f"{task.path} {theirs}", loaded[theirs])
        for name, names in task.splits.items()
        for theirs in names
        if theirs in loaded
    }


def _table(source: str, rows: datasets.Dataset) -> Table:
    return Table(source, {column: list(rows[column]) for column in rows.features})


def _is_unlabelled(task: HubTask, table: Table) -> bool:
    labels = table.columns.get(task.label_column, ())
    return all(str(label) in ("None", "", "-1", "-1.0") for label in labels)


def encode(task: HubTask, table: Table) -> datasets.Dataset:
    """A split as a task holds it.

    Raises:
        InputError: It is not what the task's schema says.
    """
    if task.kind == "generation":
        table = with_whole_texts(table, task.input_columns, task.label_column)
        answers = check_answers(table, task.label_column)
        return split_in_memory(check_texts(table, task.input_columns), task.label_column, answers)
    labels = table.columns[require_column(table, task.label_column, "the file")]
    inputs = _inputs(task, table)
    if task.kind == "regression":
        values = encode_labels(table, task.label_column, LabelScheme(float, ()))
        return split_in_memory(inputs, task.label_column, values)
    allowed: dict[object, int] = {number: number for number in range(len(task.label_names))}
    if table.written:
        allowed = {str(number): number for number in allowed.values()}
    encoded = []
    for row, label in enumerate(labels, start=1):
        if isinstance(label, (bool, float, list, dict)) or label not in allowed:
            raise InputError(
                f"{table.source}: label {one_line(repr(label), 60)} in row {row} of column "
                f"{task.label_column!r} is not one of 0..{len(allowed) - 1} "
                f"({', '.join(task.label_names)}); correct or remove the row"
            )
        encoded.append(allowed[label])
    return split_in_memory(inputs, task.label_column, encoded)


def _inputs(task: HubTask, table: Table) -> Mapping[str, Sequence[Input]]:
    if task.modality == "image":
        return {name: check_images(table, name) for name in task.input_columns}
    if not task.rendered:
        return check_texts(table, task.input_columns)
    parts = check_texts(table, _sources(task))
    rows = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    return {
        name: [template.format_map(row) for row in rows] for name, template in task.rendered.items()
    }
