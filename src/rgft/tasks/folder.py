"""The user's own data: a folder with a training file and, perhaps, validation and test files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rgft.errors import InputError
from rgft.tasks.answers import check_answers
from rgft.tasks.columns import (
    find_label_column,
    find_text_columns,
    require_column,
    require_texts,
)
from rgft.tasks.images import check_images, find_image_column
from rgft.tasks.labels import encode_labels, infer_scheme
from rgft.tasks.prompts import default_prompt
from rgft.tasks.splitting import with_validation
from rgft.tasks.tables import SUFFIXES, Table, one_line, read_table
from rgft.tasks.task import Input, TaskData, split_in_memory
from rgft.tasks.texts import check_texts

FILE_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
TRAINING = f"{', '.join(f'train{s}' for s in SUFFIXES[:-1])} or train{SUFFIXES[-1]}"
_LOG = logging.getLogger(__name__)


def load_folder(
    directory: Path,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> TaskData:
    """Load a task from `train`, `validation` and `test` files (JSON Lines, JSON, CSV or Parquet).

    Strings and ints are classes (sorted, then numbered from 0), floats are a regression. A column
    of images, as Parquet files of the hub hold them, is the input where there is one and no text
    columns are given. Without a validation file a tenth of the training rows, chosen by the hash of
    their text or image, takes its place, and the log says so.

    Args:
        directory: The folder.
        text_columns: One text column, or two for sentence pairs; found if not given.
        label_column: The label column; found if not given.

    Raises:
        InputError: The folder, a file or a column is missing or cannot be used; one line says
            where and what to do.
    """
    tables = read_folder(directory)
    train = tables["train"]
    if text_columns is not None:  # before the label, whose detection may fail as well
        require_texts(train, text_columns)
    label = find_label_column(train, label_column)
    image = None if text_columns is not None else find_image_column(train, label)
    inputs = (image,) if image is not None else find_text_columns(train, label, text_columns)
    for table in tables.values():
        require_column(table, label, "--label-column")
    scheme = infer_scheme(train, label)
    _LOG.info("%s: input from %s, label from %r (%s)", directory, inputs, label, scheme.kind)

    def checked(table: Table) -> Mapping[str, Sequence[Input]]:
        return {image: check_images(table, image)} if image else check_texts(table, inputs)

    splits = {
        name: split_in_memory(checked(table), label, encode_labels(table, label, scheme))
        for name, table in tables.items()
    }
    return TaskData(
        name=Path(directory).resolve().name,
        kind=scheme.kind,
        input_columns=inputs,
        label_column=label,
        label_names=scheme.names,
        metric="accuracy" if scheme.kind == "classification" else "pearson",
        splits=with_validation(splits, inputs, label, str(directory)),
        modality="image" if image else "text",
    )


def load_pairs(
    directory: Path, target_column: str, text_columns: Sequence[str] | None = None
) -> TaskData:
    """Load texts and the texts to write for them, from files as `load_folder` takes them.

    Args:
        directory: The folder.
        target_column: Column of the texts to write; a row may have a list, of which each answers.
        text_columns: One or two columns of what a model reads; found if not given.

    Raises:
        InputError: The folder, a file or a column is missing or cannot be used.
    """
    tables = read_folder(directory)
    train = tables["train"]
    require_column(train, target_column, "--target-column")
    inputs = find_text_columns(train, target_column, text_columns)
    _LOG.info("%s: input from %s, to be written: %r", directory, inputs, target_column)
    splits = {
        name: split_in_memory(
            check_texts(table, inputs), target_column, check_answers(table, target_column)
        )
        for name, table in tables.items()
    }
    return TaskData(
        name=Path(directory).resolve().name,
        kind="generation",
        input_columns=inputs,
        label_column=target_column,
        label_names=(),
        metric="rougeL",
        splits=with_validation(splits, inputs, target_column, str(directory)),
        prompt=default_prompt(inputs),
    )


def read_folder(
    directory: Path, names: Mapping[str, Sequence[str]] = FILE_NAMES
) -> dict[str, Table]:
    """The tables of a folder by split name; "train" is always among them.

    Args:
        directory: The folder.
        names: Names of the file of each split, without suffix.

    Raises:
        InputError: The folder or its training file is missing, a split has more than one file,
            or a file cannot be read.
    """
    require_folder(directory)
    files = {split: _find_file(directory, known) for split, known in names.items()}
    if files["train"] is None:
        here = one_line(", ".join(sorted(path.name for path in directory.iterdir())) or "nothing")
        raise InputError(
            f"{directory} has no training file (it holds: {here}); give one called {TRAINING}"
        )
    return {split: read_table(path) for split, path in files.items() if path is not None}


def digest(directory: Path) -> str:
    """SHA-256 of what `read_folder` would read: names and contents."""
    found = hashlib.sha256()
    for known in FILE_NAMES.values():
        path = _find_file(directory, known)
        if path is not None:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            found.update(path.name.encode() + b"\0" + content)
    return found.hexdigest()


def read_split(directory: Path, split: str) -> Table:
    """The table of one split alone.

    Args:
        directory: The folder.
        split: One of `FILE_NAMES`.

    Raises:
        InputError: The folder or the file is missing or cannot be read, or there are several.
    """
    require_folder(directory)
    file = _find_file(directory, FILE_NAMES[split])
    if file is None:
        wanted = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
        raise InputError(f"{directory} has no {split} file; give one called {wanted}")
    return read_table(file)


def require_folder(directory: Path) -> None:
    """Refuse what is no folder.

    Raises:
        InputError: It is not.
    """
    if not directory.is_dir():
        found = "is a file" if directory.is_file() else "does not exist"
        raise InputError(f"data folder {directory} {found}; give a folder that holds {TRAINING}")


def _find_file(directory: Path, names: Sequence[str]) -> Path | None:
    found = sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.stem.lower() in names and path.suffix.lower() in SUFFIXES
    )
    if len(found) > 1:
        raise InputError(
            f"{directory} has {len(found)} files for the {names[0]} split: "
            f"{', '.join(path.name for path in found)}; keep one of them"
        )
    return found[0] if found else None
