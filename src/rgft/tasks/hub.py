"""GLUE's SST-2, CoLA and RTE, and TREC, in their schema on the Hugging Face hub.

They are for research; none is part of this package. A local folder is used where there is one,
the hub otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets

from rgft.errors import InputError
from rgft.tasks.columns import require_column
from rgft.tasks.folder import read_folder
from rgft.tasks.splitting import with_validation
from rgft.tasks.tables import Table, one_line
from rgft.tasks.task import TaskData, split_in_memory
from rgft.tasks.texts import check_texts

DATA_VARIABLE = "RGFT_DATA"


@dataclass(frozen=True, slots=True)
class HubTask:
    """A classification task on the hub.

    Attributes:
        name: Its name here.
        description: One line.
        path: Repository of the data set on the hub.
        config: Which of its configurations; None for its only one.
        revision: Branch to load; None for the main one.
        folders: Where it may lie under the folder that `RGFT_DATA` names, first found first.
        text_columns: Columns of texts.
        label_column: Column of class numbers.
        label_names: Class names in the order of their numbers.
        metric: Headline metric.
    """

    name: str
    description: str
    path: str
    config: str | None
    revision: str | None
    folders: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    metric: str = "accuracy"


HUB_TASKS = (
    HubTask(
        name="sst2",
        description="sentiment of film-review sentences (GLUE SST-2, Socher et al. 2013)",
        path="nyu-mll/glue",
        config="sst2",
        revision=None,
        folders=("glue/sst2_sentences", "glue/sst2", "sst2"),
        text_columns=("sentence",),
        label_column="label",
        label_names=("negative", "positive"),
    ),
    HubTask(
        name="cola",
        description="whether a sentence is grammatical (GLUE CoLA, Warstadt et al. 2018)",
        path="nyu-mll/glue",
        config="cola",
        revision=None,
        folders=("glue/cola", "cola"),
        text_columns=("sentence",),
        label_column="label",
        label_names=("unacceptable", "acceptable"),
        metric="matthews_correlation",
    ),
    HubTask(
        name="rte",
        description="whether one sentence follows from another (GLUE RTE, Wang et al. 2018)",
        path="nyu-mll/glue",
        config="rte",
        revision=None,
        folders=("glue/rte", "rte"),
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        label_names=("entailment", "not_entailment"),
    ),
    HubTask(
        name="trec",
        description="what a question asks for, 6 classes (TREC, Li and Roth 2002)",
        path="CogComp/trec",
        config=None,
        # the main branch is a loading script, which is never run: this one is its tables
        revision="refs/convert/parquet",
        folders=("trec",),
        text_columns=("text",),
        label_column="coarse_label",
        label_names=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    ),
)


def load_hub_task(task: HubTask, data: Path | None = None) -> TaskData:
    """Load `task` from the folder `data`, else from under `RGFT_DATA`, else from the hub.

    A test split without labels (GLUE's are hidden) is left out. Without a validation split, a
    tenth of the training rows takes its place.

    Raises:
        InputError: It is in none of the three places, or is not what its schema says.
    """
    folder = data if data is not None else local_folder(task)
    tables = _from_hub(task) if folder is None else read_folder(folder)
    splits = {
        name: _encode(task, table)
        for name, table in tables.items()
        if not (name == "test" and _is_unlabelled(task, table))
    }
    source = str(folder or task.path)
    return TaskData(
        name=task.name,
        kind="classification",
        text_columns=task.text_columns,
        label_column=task.label_column,
        label_names=task.label_names,
        metric=task.metric,
        splits=with_validation(splits, task.text_columns, task.label_column, source),
    )


def local_folder(task: HubTask) -> Path | None:
    """The task's folder under the one that `RGFT_DATA` names, if it is there."""
    root = os.environ.get(DATA_VARIABLE)
    folders = [Path(root, folder) for folder in task.folders] if root else []
    return next((folder for folder in folders if folder.is_dir()), None)


def is_available(task: HubTask) -> bool:
    """Whether the task can be loaded without the network."""
    cached = Path(datasets.config.HF_DATASETS_CACHE, task.path.replace("/", "___"))
    return local_folder(task) is not None or (cached / (task.config or "default")).is_dir()


def _from_hub(task: HubTask) -> Mapping[str, Table]:
    try:
        loaded = datasets.load_dataset(task.path, task.config, revision=task.revision)
    # the hub's client, its transport and the data library raise unrelated families of errors
    except Exception as problem:
        folders = " or ".join(f"${DATA_VARIABLE}/{folder}" for folder in task.folders)
        raise InputError(
            f"task {task.name!r} is not on this machine and cannot be fetched from the hub "
            f"({type(problem).__name__}: {one_line(problem, 80)}); go online, or put train, "
            f"validation and test as JSONL, CSV or Parquet into {folders}"
        ) from problem
    return {
        name: Table(f"{task.path} {name}", {column: list(rows[column]) for column in rows.features})
        for name, rows in loaded.items()
        if name in ("train", "validation", "test")
    }


def _is_unlabelled(task: HubTask, table: Table) -> bool:
    labels = table.columns.get(task.label_column, ())
    return all(label in (None, "", -1, "-1") for label in labels)


def _encode(task: HubTask, table: Table) -> datasets.Dataset:
    labels = table.columns[require_column(table, task.label_column, "the file")]
    texts = check_texts(table, task.text_columns)
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
    return split_in_memory(texts, task.label_column, encoded)
