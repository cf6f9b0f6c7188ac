"""The tasks of SuperGLUE (Wang et al. 2019) that classify texts or pairs; for research.

SuperGLUE's RTE is GLUE's. Left out: COPA (a choice between two texts), ReCoRD (an answer out of a
passage) and WSC (two places in a sentence), which need other heads; and the diagnostic sets.
MultiRC is judged answer by answer: its exact match of all answers of a question is not computed.
"""

from __future__ import annotations

from functools import partial

from rgft.tasks.hub import HubTask

# the main branch is a loading script, which is never run: this one is its tables
_task = partial(HubTask, path="aps/super_glue", revision="refs/convert/parquet")

SUPERGLUE = (
    _task(
        name="boolq",
        description="yes or no, by a passage (SuperGLUE BoolQ, Clark et al. 2019)",
        directory="boolq",
        folders=("super_glue/boolq", "boolq"),
        input_columns=("question", "passage"),
        label_names=("False", "True"),
    ),
    _task(
        name="cb",
        description="entailment, contradiction or neutral (SuperGLUE CB, de Marneffe et al. 2019)",
        directory="cb",
        folders=("super_glue/cb", "cb"),
        input_columns=("premise", "hypothesis"),
        label_names=("entailment", "contradiction", "neutral"),
        metric="f1_macro",
    ),
    _task(
        name="multirc",
        description="whether an answer is right, by a passage (SuperGLUE MultiRC, Khashabi et al. "
        "2018)",
        directory="multirc",
        folders=("super_glue/multirc", "multirc"),
        input_columns=("asked", "paragraph"),
        rendered={"asked": "{question} {answer}", "paragraph": "{paragraph}"},
        label_names=("False", "True"),
        metric="f1_macro",
    ),
    _task(
        name="wic",
        description="whether a word means the same in two sentences (SuperGLUE WiC, Pilehvar and "
        "Camacho-Collados 2019)",
        directory="wic",
        folders=("super_glue/wic", "wic"),
        input_columns=("first", "second"),
        rendered={"first": "{word}: {sentence1}", "second": "{sentence2}"},
        label_names=("False", "True"),
    ),
)
