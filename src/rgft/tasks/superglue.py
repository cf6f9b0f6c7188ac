"""The tasks of SuperGLUE (Wang et al. 2019) that classify texts or pairs; for research.

SuperGLUE's RTE is GLUE's. Left out: COPA (a choice between two texts), ReCoRD (an answer out of a
passage) and WSC (two places in a sentence), which need other heads; and the diagnostic sets.
MultiRC is judged answer by answer: its exact match of all answers of a question is not computed.
"""

from __future__ import annotations

from typing import Any

from rgft.tasks.hub import HubTask

# the main branch is a loading script, which is never run: this one is its tables
REVISION = "refs/convert/parquet"


def _task(name: str, **fields: Any) -> HubTask:
    """The task of this name."""
    return HubTask(
        name=name,
        path="aps/super_glue",
        revision=REVISION,
        directory=name,
        folders=(f"super_glue/{name}", name),
        **fields,
    )


SUPERGLUE = (
    _task(
        "boolq",
        description="yes or no, by a passage (SuperGLUE BoolQ, Clark et al. 2019)",
        input_columns=("question", "passage"),
        label_names=("False", "True"),
    ),
    _task(
        "cb",
        description="entailment, contradiction or neutral (SuperGLUE CB, de Marneffe et al. 2019)",
        input_columns=("premise", "hypothesis"),
        label_names=("entailment", "contradiction", "neutral"),
        metric="f1_macro",
    ),
    _task(
        "multirc",
        description="whether an answer is right, by a passage (SuperGLUE MultiRC, Khashabi et al. "
        "2018)",
        input_columns=("asked", "paragraph"),
        rendered={"asked": "{question} {answer}", "paragraph": "{paragraph}"},
        label_names=("False", "True"),
        metric="f1_macro",
    ),
    _task(
        "wic",
        description="whether a word means the same in two sentences (SuperGLUE WiC, Pilehvar and "
        "Camacho-Collados 2019)",
        input_columns=("first", "second"),
        rendered={"first": "{word}: {sentence1}", "second": "{sentence2}"},
        label_names=("False", "True"),
    ),
)
