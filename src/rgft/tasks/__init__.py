"""Tasks by name, each from where it is loaded, and the user's own data from a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rgft.errors import unknown
from rgft.tasks import fashion, hub, mathematics, reviews
from rgft.tasks.cifar import CIFAR
from rgft.tasks.fashion import FASHION
from rgft.tasks.folder import load_folder, load_pairs
from rgft.tasks.glue import GLUE
from rgft.tasks.mathematics import GSM8K, METAMATHQA
from rgft.tasks.summaries import SUMMARIES
from rgft.tasks.superglue import SUPERGLUE
from rgft.tasks.task import Kind, Modality, TaskData
from rgft.tasks.trec import TREC

__all__ = [
    "HUB_TASKS",
    "TASKS",
    "Kind",
    "Modality",
    "TaskData",
    "TaskEntry",
    "load_folder",
    "load_pairs",
    "load_task",
]


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task that can be loaded by name.

    Attributes:
        description: One line.
        kind: "classification", "regression" or "generation".
        metric: Headline metric.
        origin: Where it comes from.
        load: Loads it, from the folder given or from where it lies by default.
        available: Whether it can be loaded without the network.
        modality: "text" or "image".
        classes: How many classes its labels have; None for other kinds.
    """

    description: str
    kind: Kind
    metric: str
    origin: str
    load: Callable[[Path | None], TaskData]
    available: Callable[[], bool]
    modality: Modality = "text"
    classes: int | None = None


def _hub_entry(task: hub.HubTask) -> TaskEntry:
    return TaskEntry(
        description=task.description,
        kind=task.kind,
        metric=task.metric,
        origin=f"${hub.DATA_VARIABLE}/{task.folders[0]}, or the hub's {task.path}",
        load=functools.partial(hub.load_hub_task, task),
        available=functools.partial(hub.is_available, task),
        modality=task.modality,
        classes=len(task.label_names) or None,
    )


HUB_TASKS = (*GLUE, *SUPERGLUE, *TREC, *CIFAR, *SUMMARIES, GSM8K)

TASKS: dict[str, TaskEntry] = {
    "reviews": TaskEntry(
        description="sentiment of film reviews; also tested on Amazon reviews, news and tweets",
        kind="classification",
        metric="accuracy",
        origin=f"source distribution of {reviews.REQUIREMENT} through pip (MIT licence)",
        load=reviews.load_reviews,
        available=reviews.is_available,
        classes=2,
    ),
    "reviews-rating": TaskEntry(
        description="mean sentiment rating, -4 to 4, of the same texts",
        kind="regression",
        metric="pearson",
        origin=f"source distribution of {reviews.REQUIREMENT} through pip (MIT licence)",
        load=reviews.load_ratings,
        available=reviews.is_available,
    ),
    **{task.name: _hub_entry(task) for task in HUB_TASKS},
    FASHION.name: TaskEntry(
        description=FASHION.description,
        kind=FASHION.kind,
        metric=FASHION.metric,
        origin=f"Debian's {fashion.PACKAGE} through apt-get, or the hub's {FASHION.path}",
        load=fashion.load_fashion,
        available=fashion.is_available,
        modality=FASHION.modality,
        classes=len(FASHION.label_names),
    ),
    METAMATHQA.name: TaskEntry(
        description=METAMATHQA.description,
        kind=METAMATHQA.kind,
        metric=METAMATHQA.metric,
        origin=f"${hub.DATA_VARIABLE}/{METAMATHQA.folders[0]}, or the hub's {METAMATHQA.path}; "
        f"and {GSM8K.name}",
        load=mathematics.load_metamathqa,
        available=mathematics.is_available,
    ),
}


def load_task(name: str, data: Path | None = None) -> TaskData:
    """Load a task by name; from then on it loads without the network.

    Args:
        name: One of `TASKS`.
        data: Folder that holds it; by default it is found, or fetched, by itself.

    Raises:
        InputError: No task has that name, or it can be neither found nor fetched.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS, "; your own data: a folder with --data")
    return TASKS[name].load(data)
