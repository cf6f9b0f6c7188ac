"""GLUE (Wang et al. 2018) but for WNLI; for research, and no part of this package.

WNLI is left out, as in most published tables: its development set contradicts its training set.
MRPC and QQP are judged by accuracy; their second metric, F1 of the positive class, is not computed.
"""

from __future__ import annotations

from typing import Any

from rgft.tasks.hub import HubTask

PAIR = ("sentence1", "sentence2")
FOLLOWS = ("entailment", "not_entailment")


def _task(name: str, more: tuple[str, ...] = (), **fields: Any) -> HubTask:
    """The task of this name; `more` folders of data may be of older files."""
    folders = (*more, f"glue/{name}", name)
    return HubTask(name=name, path="nyu-mll/glue", config=name, folders=folders, **fields)


GLUE = (
    _task(
        "sst2",
        description="sentiment of film-review sentences (GLUE SST-2, Socher et al. 2013)",
        more=("glue/sst2_sentences",),
        input_columns=("sentence",),
        label_names=("negative", "positive"),
    ),
    _task(
        "cola",
        description="whether a sentence is grammatical (GLUE CoLA, Warstadt et al. 2018)",
        input_columns=("sentence",),
        label_names=("unacceptable", "acceptable"),
        metric="matthews_correlation",
    ),
    _task(
        "mrpc",
        description="whether two sentences say the same (GLUE MRPC, Dolan and Brockett 2005)",
        input_columns=PAIR,
        label_names=("not_equivalent", "equivalent"),
    ),
    _task(
        "stsb",
        description="how alike two sentences are, 0 to 5 (GLUE STS-B, Cer et al. 2017)",
        input_columns=PAIR,
        label_names=(),
        metric="pearson",
        kind="regression",
    ),
    _task(
        "qqp",
        description="whether two questions ask the same (GLUE QQP)",
        input_columns=("question1", "question2"),
        label_names=("not_duplicate", "duplicate"),
    ),
    _task(
        "mnli",
        description="entailment, neutral or contradiction; also other genres (GLUE MNLI, "
        "Williams et al. 2018)",
        input_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        splits={
            "train": ("train",),
            "validation": ("validation_matched", "validation"),
            "mismatched": ("validation_mismatched", "mismatched"),
        },
    ),
    _task(
        "qnli",
        description="whether a sentence answers a question (GLUE QNLI, Rajpurkar et al. 2016)",
        input_columns=("question", "sentence"),
        label_names=FOLLOWS,
    ),
    _task(
        "rte",
        description="whether one sentence follows from another (GLUE RTE, Wang et al. 2018)",
        input_columns=PAIR,
        label_names=FOLLOWS,
    ),
)
