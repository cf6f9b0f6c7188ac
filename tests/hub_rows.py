"""A few random rows in the schema that each task has on the hub, as Parquet files."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Features, List, Value
from PIL import Image

import tiny_run

TEXT, NUMBER = Value("string"), Value("int32")
PAIR = {"sentence1": TEXT, "sentence2": TEXT}
FOLLOWS = ("entailment", "not_entailment")
YES_NO = ("False", "True")


def _glue(names: tuple[str, ...], **texts: Any) -> Features:
    return Features({**texts, "label": ClassLabel(names=names), "idx": NUMBER})


def _superglue(names: tuple[str, ...], **columns: Any) -> Features:
    return Features({**columns, "idx": NUMBER, "label": ClassLabel(names=names)})


# copied from the cards of the data sets, not from the code that reads them
SCHEMAS: Mapping[str, Features] = {
    "sst2": _glue(("negative", "positive"), sentence=TEXT),
    "cola": _glue(("unacceptable", "acceptable"), sentence=TEXT),
    "mrpc": _glue(("not_equivalent", "equivalent"), **PAIR),
    "stsb": Features({**PAIR, "label": Value("float32"), "idx": NUMBER}),
    "qqp": _glue(("not_duplicate", "duplicate"), question1=TEXT, question2=TEXT),
    "mnli": _glue(("entailment", "neutral", "contradiction"), premise=TEXT, hypothesis=TEXT),
    "qnli": _glue(FOLLOWS, question=TEXT, sentence=TEXT),
    "rte": _glue(FOLLOWS, **PAIR),
    "boolq": _superglue(YES_NO, question=TEXT, passage=TEXT),
    "cb": _superglue(("entailment", "contradiction", "neutral"), premise=TEXT, hypothesis=TEXT),
    "multirc": Features(
        {"paragraph": TEXT, "question": TEXT, "answer": TEXT}
        | {"idx": {"paragraph": NUMBER, "question": NUMBER, "answer": NUMBER}}
        | {"label": ClassLabel(names=YES_NO)}
    ),
    "wic": _superglue(
        YES_NO,
        **{
            "word": TEXT,
            **PAIR,
            "start1": NUMBER,
            "start2": NUMBER,
            "end1": NUMBER,
            "end2": NUMBER,
        },
    ),
    "trec": Features(
        {"text": TEXT, "coarse_label": ClassLabel(num_classes=6)}
        | {"fine_label": ClassLabel(num_classes=50)}
    ),
    "cifar100": Features(
        {"img": datasets.Image(), "fine_label": ClassLabel(num_classes=100)}
        | {"coarse_label": ClassLabel(num_classes=20)}
    ),
    "fashion-mnist": Features({"image": datasets.Image(), "label": ClassLabel(num_classes=10)}),
    "xsum": Features({"document": TEXT, "summary": TEXT, "id": TEXT}),
    "scitldr": Features(
        {"source": List(TEXT), "source_labels": List(ClassLabel(names=["non-oracle", "oracle"]))}
        | {"rouge_scores": List(Value("float32")), "paper_id": TEXT, "target": List(TEXT)}
    ),
    "gsm8k": Features({"question": TEXT, "answer": TEXT}),
    "wikitext": Features({"text": TEXT}),
    "metamathqa": Features(
        {"type": TEXT, "query": TEXT, "original_question": TEXT, "response": TEXT}
    ),
}
CUES = {"answer": "####", "response": "The answer is:"}  # before the number that is asked for
SPLITS = {"train": "train", "validation": "validation", "test": "test"}
NO_VALIDATION = {"train": "train", "test": "test"}
HUB_SPLITS: Mapping[str, Mapping[str, str]] = {
    "mnli": {"train": "train", "validation": "validation_matched"}
    | {"mismatched": "validation_mismatched", "test": "test_matched"},
    "trec": NO_VALIDATION,
    "cifar100": NO_VALIDATION,
    "fashion-mnist": NO_VALIDATION,
    "gsm8k": NO_VALIDATION,
    "metamathqa": {"train": "train"},
}
LABELLED_TESTS = ("trec", "cifar100", "fashion-mnist", "xsum", "scitldr", "gsm8k")


def rows(task: str, count: int, *, labelled: bool = True) -> datasets.Dataset:
    """Rows with every class in turn, or with the label -1."""
    schema, rng = SCHEMAS[task], random.Random(task)
    pixels = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [] for name in schema}
    for row in range(count):
        for name, feature in schema.items():
            value = _value(feature, row, rng, pixels, labelled)
            columns[name].append(f"{value}\n{CUES[name]} {row % 7}" if name in CUES else value)
    return datasets.Dataset.from_dict(columns, features=schema)


def write(task: str, folder: Path, counts: Mapping[str, int]) -> Path:
    """Parquet files of the splits that the task has on the hub, by their names there."""
    folder.mkdir(parents=True)
    for split, file in HUB_SPLITS.get(task, SPLITS).items():
        count = counts["train" if split == "train" else "validation"]
        labelled = split != "test" or task in LABELLED_TESTS
        rows(task, count, labelled=labelled).to_parquet(folder / f"{file}.parquet")
    return folder


def _value(
    feature: Any, row: int, rng: random.Random, pixels: np.random.Generator, labelled: bool
) -> Any:
    if isinstance(feature, dict):
        return dict.fromkeys(feature, row)
    if isinstance(feature, List):
        return [_value(feature.feature, row, rng, pixels, labelled) for _ in range(2)]
    if isinstance(feature, ClassLabel):
        return row % feature.num_classes if labelled else -1
    if isinstance(feature, datasets.Image):
        return Image.fromarray(pixels.integers(0, 256, (28, 28, 3), dtype=np.uint8))
    if feature == TEXT:
        return tiny_run.classified(rng)["text"]
    score = rng.uniform(0, 5) if labelled else -1.0
    return score if feature.dtype == "float32" else row
