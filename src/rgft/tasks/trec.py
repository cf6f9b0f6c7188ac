"""TREC's question types (Li and Roth 2002); for research."""

from __future__ import annotations

from rgft.tasks.hub import HubTask

TREC = (
    HubTask(
        name="trec",
        description="what a question asks for, 6 classes (TREC, Li and Roth 2002)",
        path="CogComp/trec",
        # the main branch is a loading script, which is never run: this one is its tables
        revision="refs/convert/parquet",
        folders=("trec",),
        input_columns=("text",),
        label_column="coarse_label",
        label_names=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    ),
)
