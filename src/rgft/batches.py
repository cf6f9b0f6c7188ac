"""Texts to token batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgft.errors import InputError
from rgft.models import load_classifier, load_tokenizer
from rgft.progress import bar
from rgft.residuals import SAMPLE_IDS
from rgft.tasks.task import TaskData

Example = dict[str, Any]
CHUNK = 200  # rows between two looks at the bar
EVALUATION_BATCH = 64
MULTIPLE = 2  # lengths are padded to it: half as many shapes to price, at little padding


def tokenize(task: TaskData, split: str, tokenizer: Any, max_length: int) -> list[Example]:
    """Token ids and label of every row of a split, cut at `max_length` tokens.

    Rows are in their order in "train", and from short to long elsewhere: metrics do not depend on
    the order, and batches of like lengths need little padding.
    """
    data = task.splits[split]
    texts = [list(data[column]) for column in task.input_columns]
    labels = list(data[task.label_column])
    examples: list[Example] = []
    with bar(f"tokenizing {split}", len(labels), "row", delay=1) as shown:
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            encoded = tokenizer(*(t[rows] for t in texts), truncation=True, max_length=max_length)
            columns = [encoded[key] for key in encoded]
            for *values, label in zip(*columns, labels[rows], strict=True):
                examples.append({**dict(zip(encoded, values, strict=True)), "labels": label})
            shown.update(len(labels[rows]))
    if split != "train":
        examples.sort(key=lambda example: len(example["input_ids"]))
    return examples


BESIDE = ("labels", SAMPLE_IDS)  # what is not padded


def numbered(examples: Sequence[Example]) -> list[Example]:
    """The examples, each with its position: what is remembered of a sample goes by it.

    >>> numbered([{"labels": 1}])
    [{'labels': 1, 'sample_ids': 0}]
    """
    return [{**example, SAMPLE_IDS: i} for i, example in enumerate(examples)]


class Collator:
    """Pads examples to the longest of the batch, rounded up to an even number."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: each value `[B, L]`; labels `[B]` int64 or float32; ids `[B]`, if given."""
        inputs = [{k: v for k, v in example.items() if k not in BESIDE} for example in examples]
        padded = self._tokenizer.pad(inputs, pad_to_multiple_of=MULTIPLE, return_tensors="pt")
        return labelled(padded, examples)


def labelled(
    inputs: Mapping[str, Tensor], examples: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """A batch with "labels", `[B]` int64 or float32, and the samples' ids `[B]`, if given."""
    labels = [example["labels"] for example in examples]
    dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
    batch = {**inputs, "labels": torch.tensor(labels, dtype=dtype)}
    if SAMPLE_IDS in examples[0]:
        batch[SAMPLE_IDS] = torch.tensor([example[SAMPLE_IDS] for example in examples])
    return batch


class TextInputs:
    """Texts as the model's tokenizer makes them; what a run on a task of texts uses.

    Args:
        model: Folder, hub id or packaged name.
        max_length: Tokens a text is cut at, if the model does not stop before.

    Raises:
        InputError: The tokenizer cannot be loaded.
    """

    multiple = MULTIPLE
    evaluation_batch = EVALUATION_BATCH

    def __init__(self, model: str, max_length: int) -> None:
        self.processor: Any = load_tokenizer(model)
        self._model = model
        self._longest = min(max_length, self.processor.model_max_length)
        self.collate = Collator(self.processor)

    @property
    def files(self) -> tuple[str, ...]:
        """Of the vocabulary."""
        return tuple(self.processor.vocab_files_names.values())

    def load_model(self, labels: tuple[str, ...]) -> nn.Module:
        """The classifier with a new head.

        Raises:
            InputError: It reads a text by its end token, which the tokenizer does not set.
        """
        loaded = load_classifier(self._model, labels, self.processor.pad_token_id)
        config: Any = loaded.config
        ends = self.processor("a")["input_ids"][-1] == config.eos_token_id
        if config.is_encoder_decoder and not ends:
            raise InputError(
                f"the tokenizer of '{self._model}' ends no text with the model's end token, by "
                f"which {type(loaded).__name__} reads it; give one that does, or another model"
            )
        return loaded

    def examples(self, task: TaskData, split: str) -> list[Example]:
        """Token ids and label of every row of a split."""
        return tokenize(task, split, self.processor, self._longest)

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        """Its tokens."""
        return (len(example["input_ids"]),)

    def longest(self, examples: Sequence[Example]) -> Example:
        """The one with the most tokens."""
        return max(examples, key=self.lengths)

    def cut(self, example: Example, lengths: Sequence[int]) -> Example:
        """Its first tokens, and the last, which may be what ends a text."""
        (most,) = lengths
        return {
            k: [*v[: most - 1], v[-1]] if isinstance(v, list) and len(v) > most else v
            for k, v in example.items()
        }
