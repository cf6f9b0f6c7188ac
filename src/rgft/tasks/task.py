"""A task: texts or images with labels or answers, in splits, and the metric that judges a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import datasets

Kind = Literal["classification", "regression", "generation"]
Modality = Literal["text", "image"]
Input = str | bytes  # a text, or an image as the bytes of its file


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """A task, loaded.

    Attributes:
        name: What it is called in a run's records.
        kind: "classification" (labels are ints 0..n-1), "regression" (labels are floats) or
            "generation" (labels are lists of texts, each of which answers; the first is learned).
        input_columns: One column of texts, or two for sentence pairs; or one of images.
        label_column: The column of labels.
        label_names: Name of each class by its int; empty for other kinds.
        metric: The headline metric, one of those of its kind of which more is better.
        splits: "train", "validation", where there is one "test", and any further test sets
            (other domains) by name. Each holds the input columns and the label column, in memory.
        modality: "text", or "image" for bytes of image files that Pillow reads.
        prompt: For generation: what a model reads, with the input columns in braces.
    """

    name: str
    kind: Kind
    input_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    metric: str
    splits: Mapping[str, datasets.Dataset]
    modality: Modality = "text"
    prompt: str | None = None

    @property
    def num_labels(self) -> int:
        """Outputs a model's head needs: the number of classes, or 1 for regression."""
        return len(self.label_names) if self.kind == "classification" else 1

    def fingerprint(self) -> str:
        """SHA-256 of the content: columns, classes, metric, and every row of every split in order.

        Two tasks with the same fingerprint train alike, so a resumed run can check that its data
        is the data that it began with. The name is not part of it: a moved folder stays the same.
        """
        digest = hashlib.sha256()

        def add(value: object) -> None:
            written = json.dumps(value, ensure_ascii=True, default=_bytes_digest)
            digest.update(written.encode() + b"\n")

        add([self.kind, self.input_columns, self.label_column, self.label_names, self.metric])
        if self.prompt is not None:
            add(self.prompt)
        for split in sorted(self.splits):
            rows = self.splits[split]
            add([split, len(rows)])
            for row in zip(*(rows[name] for name in self._columns()), strict=True):
                add(row)
        return digest.hexdigest()

    def _columns(self) -> tuple[str, ...]:
        return (*self.input_columns, self.label_column)


def split_in_memory(
    inputs: Mapping[str, Sequence[Input]],
    label_column: str,
    labels: Sequence[int] | Sequence[float] | Sequence[Sequence[str]],
) -> datasets.Dataset:
    """A split that lives in memory alone.

    Args:
        inputs: Columns of texts (str) or of images (bytes) by name, each [rows].
        label_column: Name of the label column.
        labels: All ints (classes), all floats or all lists of texts, [rows].
    """
    label_type: object = datasets.Value("float64")
    if all(isinstance(label, int) for label in labels):
        label_type = datasets.Value("int64")
    elif all(isinstance(label, list) for label in labels):
        label_type = datasets.List(datasets.Value("string"))
    features = {
        name: datasets.Value("large_binary" if isinstance(values[0], bytes) else "string")
        for name, values in inputs.items()
    }
    columns = {name: list(values) for name, values in inputs.items()}
    return datasets.Dataset.from_dict(
        columns | {label_column: list(labels)},
        features=datasets.Features(features | {label_column: label_type}),
    )


def _bytes_digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
