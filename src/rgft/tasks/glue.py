"""GLUE (Wang et al. 2018) but for WNLI; for research, and no part of this package.

WNLI is left out, as in most published tables: its development set contradicts its training set.
MRPC and QQP are judged by accuracy; their second metric, F1 of the positive class, is not computed.
"""

from __future__ import annotations

from functools import partial

from rgft.tasks.hub import HubTask

PAIR = ("sentence1", "sentence2")
FOLLOWS = ("entailment", "not_entailment")
_task = partial(HubTask, path="nyu-mll/glue")

GLUE = (
    _task(
        name="sst2",
        description="sentiment of film-review sentences (GLUE SST-2, Socher et al. 2013)",
        config="sst2",
        folders=("glue/sst2_sentences", "glue/sst2", "sst2"),
        input_columns=("sentence",),
        label_names=("negative", "positive"),
    ),
    _task(
        name="cola",
        description="whether a sentence is grammatical (GLUE CoLA, Warstadt et al. 2018)",
        config="cola",
        folders=("glue/cola", "cola"),
        input_columns=("sentence",),
        label_names=("unacceptable", "acceptable"),
        metric="matthews_correlation",
    ),
    _task(
        name="mrpc",
        description="whether two sentences say the same (GLUE MRPC, Dolan and Brockett 2005)",
        config="mrpc",
        folders=("glue/mrpc", "mrpc"),
        input_columns=PAIR,
        label_names=("not_equivalent", "equivalent"),
    ),
    _task(
        name="stsb",
        description="how alike two sentences are, 0 to 5 (GLUE STS-B, Cer et al. 2017)",
        config="stsb",
        folders=("glue/stsb", "stsb"),
        input_columns=PAIR,
        label_names=(),
        metric="pearson",
        kind="regression",
    ),
    _task(
        name="qqp",
        description="whether two questions ask the same (GLUE QQP)",
        config="qqp",
        folders=("glue/qqp", "qqp"),
        input_columns=("question1", "question2"),
        label_names=("not_duplicate", "duplicate"),
    ),
    _task(
        name="mnli",
        description="entailment, neutral or contradiction; also other genres (GLUE MNLI, "
        "Williams et al. 2018)",
        config="mnli",
        folders=("glue/mnli", "mnli"),
        input_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        splits={
            "train": ("train",),
            "validation": ("validation_matched", "validation"),
            "mismatched": ("validation_mismatched", "mismatched"),
        },
    ),
    _task(
        name="qnli",
        description="whether a sentence answers a question (GLUE QNLI, Rajpurkar et al. 2016)",
        config="qnli",
        folders=("glue/qnli", "qnli"),
        input_columns=("question", "sentence"),
        label_names=FOLLOWS,
    ),
    _task(
        name="rte",
        description="whether one sentence follows from another (GLUE RTE, Wang et al. 2018)",
        config="rte",
        folders=("glue/rte", "rte"),
        input_columns=PAIR,
        label_names=FOLLOWS,
    ),
)
