"""A task of your own: is a sum of two small numbers, in words, larger than ten?

rgft train --extend examples/own_task.py --task larger-than-ten --output-dir DIR
rgft bench SUITE.yaml --extend examples/own_task.py --output-dir DIR
"""

from __future__ import annotations

from pathlib import Path

from rgft.tasks import TaskData, TaskEntry
from rgft.tasks.task import split_in_memory

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PAIRS = [(a, b) for a in range(11) for b in range(11)]
SPLITS = {"train": PAIRS[0::2], "validation": PAIRS[1::4], "test": PAIRS[3::4]}


def load(data: Path | None = None) -> TaskData:
    """Texts and labels, 0 or 1, in splits."""
    del data  # there is no folder to look in
    splits = {}
    for name, pairs in SPLITS.items():
        texts = [f"{WORDS[a]} and {WORDS[b]}" for a, b in pairs]
        labels = [int(a + b > 10) for a, b in pairs]
        splits[name] = split_in_memory({"text": texts}, "label", labels)
    names, metric = ("no", "yes"), "accuracy"
    return TaskData("larger-than-ten", "classification", ("text",), "label", names, metric, splits)


TASKS = {
    "larger-than-ten": TaskEntry(
        "sums", "classification", "accuracy", "made here", load, lambda: True
    )
}
