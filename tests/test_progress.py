"""What a terminal shows while something takes long, and that nothing else shows it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from rgft.progress import bar, waiting

SLOW = """
import time
from datasets import Dataset
from rgft.batches import tokenize
from rgft.progress import waiting
from rgft.tasks.task import TaskData

def slow(texts, truncation, max_length):
    time.sleep(0.7)
    return {"input_ids": [[1] for _ in texts]}

with waiting("loading the model"):
    time.sleep(0.3)
rows = Dataset.from_dict({"text": ["a"] * 800, "label": [0, 1] * 400})
columns = ("text",), "label"
task = TaskData("own", "classification", *columns, ("0", "1"), "accuracy", {"train": rows})
print(len(tokenize(task, "train", slow, 8)))
"""


def test_what_takes_long_is_shown_on_a_terminal() -> None:
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        stdout=subprocess.PIPE,
        stderr=writing,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        text=True,
    )
    os.close(writing)
    said = b"".join(iter(lambda: _read(reading), b"")).decode()
    out = process.communicate(timeout=60)[0]
    os.close(reading)
    assert (process.returncode, out) == (0, "800\n"), said
    assert "loading the model" in said
    assert "tokenizing train" in said


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # its end
        return b""


def test_nothing_else_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    with waiting("loading the model"):
        time.sleep(0.2)
    with bar("tokenizing", 2, "row", delay=0.01) as shown:
        time.sleep(0.05)
        shown.update(2)
    assert capfd.readouterr() == ("", "")
