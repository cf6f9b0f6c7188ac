"""Worked answers to questions of arithmetic: GSM8K, and MetaMathQA, which is judged on GSM8K.

MetaMathQA is used as in PEFT's comparison of its methods: rows of more than 1300 characters are
left out, 50 of GSM8K's training questions are the validation split, its test questions the test
split. MetaMathQA was made out of GSM8K's training questions (among others), so that the validation
split measures less than the test split does.
"""

from __future__ import annotations

from pathlib import Path

import datasets

from rgft.tasks.hub import (
    HubTask,
    encode,
    load_hub_task,
    of_splits,
    tables_of,
)
from rgft.tasks.hub import (
    is_available as is_available_from,
)
from rgft.tasks.splitting import fewer_evaluation_rows
from rgft.tasks.task import TaskData

LONGEST = 1300  # characters of a question and its answer
VALIDATION_ROWS = 50

GSM8K = HubTask(
    name="gsm8k",
    description="grade-school mathematics, worked out (GSM8K, Cobbe et al. 2021)",
    path="openai/gsm8k",
    config="main",
    folders=("gsm8k/main", "gsm8k"),
    input_columns=("question",),
    label_column="answer",
    metric="exact_match",
    kind="generation",
    prompt="Question: {question} Think step by step.\nAnswer:",
)
METAMATHQA = HubTask(
    name="metamathqa",
    description="questions of mathematics, tested on GSM8K (MetaMathQA, Yu et al. 2023)",
    path="meta-math/MetaMathQA",
    folders=("metamathqa",),
    input_columns=("query",),
    label_column="response",
    metric="exact_match",
    kind="generation",
    prompt="Question: {query} Think step by step.\nAnswer:",
)


def load_metamathqa(data: Path | None = None) -> TaskData:
    """MetaMathQA to train on; validation and test are GSM8K's where its folder has none.

    Raises:
        InputError: One of the two can be neither found nor fetched, or is not what it should be.
    """
    tables, _ = tables_of(METAMATHQA, data)
    splits = {name: encode(METAMATHQA, table) for name, table in tables.items()}
    splits["train"] = _short(splits["train"])
    if not {"validation", "test"} <= splits.keys():
        splits = {**_questions(), **splits}
    return of_splits(METAMATHQA, splits)


def is_available() -> bool:
    """Whether both can be loaded without the network."""
    return is_available_from(METAMATHQA) and is_available_from(GSM8K)


def _short(rows: datasets.Dataset) -> datasets.Dataset:
    """Those that a few hundred tokens hold."""
    pairs = zip(rows["query"], rows["response"], strict=True)
    kept = [
        i for i, (query, answers) in enumerate(pairs) if len(f"{query} {answers[0]}") <= LONGEST
    ]
    return rows.select(kept)


def _questions() -> dict[str, datasets.Dataset]:
    """Validation and test, in MetaMathQA's columns."""
    task = load_hub_task(GSM8K)
    wanted = {name: rows for name, rows in task.splits.items() if name != "train"}
    if len(wanted["validation"]) > VALIDATION_ROWS:
        fewer = fewer_evaluation_rows(task, VALIDATION_ROWS).splits
        wanted["validation"] = fewer["validation"]
    names = {"question": "query", "answer": "response"}
    return {name: rows.rename_columns(names) for name, rows in wanted.items()}
