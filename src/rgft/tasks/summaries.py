"""Summaries in one sentence: XSum of news, SciTLDR of papers.

The prompt of both is the one that T5 was pre-trained with; other models learn it as they train.
"""

from __future__ import annotations

from functools import partial

from rgft.tasks.hub import HubTask

# the main branches are loading scripts, which are never run: these are their tables
_task = partial(HubTask, kind="generation", metric="rougeL", revision="refs/convert/parquet")

SUMMARIES = (
    _task(
        name="xsum",
        description="a news article in one sentence (XSum, Narayan et al. 2018)",
        path="EdinburghNLP/xsum",
        directory="default",
        folders=("xsum",),
        input_columns=("document",),
        label_column="summary",
        prompt="summarize: {document}\n",
    ),
    _task(
        name="scitldr",
        description="an abstract in one sentence (SciTLDR, Cachola et al. 2020)",
        path="allenai/scitldr",
        directory="Abstract",
        folders=("scitldr/Abstract", "scitldr"),
        input_columns=("source",),
        label_column="target",
        prompt="summarize: {source}\n",
    ),
)
