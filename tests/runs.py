"""Runs in processes that can be killed, and what of two runs must be the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from rgft.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("rgft.cli", "rgft.train", "peft", "transformers.models.bert.modeling_bert"),
        *("transformers.models.bert.tokenization_bert", "rgft.report"),
        *("torch.distributed.fsdp", "torch.distributed.tensor"),
    ]
)


def _command(arguments: list[str], output: Path) -> None:
    """`rgft` with these arguments; what it prints goes to two files."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output.with_name(f"{output.name}.{name}"), _CREATE), number)
    sys.argv = ["rgft", *arguments]
    main()


_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def warm_up() -> None:
    """Have everything imported, so that what follows takes as long as the run itself."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def start(arguments: list[str], output: Path) -> BaseProcess:
    """The command in a process of its own, forked from one in which everything is imported."""
    process = CONTEXT.Process(target=_command, args=(arguments, output))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120) -> int:
    """Its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def assert_a_kill_leaves_no_trace(arguments: list[str], folder: Path) -> None:
    """A run killed after its first checkpoint and resumed ends as one that no one killed."""
    warm_up()
    whole, cut = folder / "whole", folder / "cut"
    assert finish(start([*arguments, "--output-dir", str(whole)], whole)) == 0
    process = start([*arguments, "--output-dir", str(cut)], cut)
    while not list(cut.glob("checkpoints/checkpoint-*")):
        time.sleep(0.01)
        assert process.is_alive() or record_of(cut)["status"] == "finished"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert finish(start(["train", "--resume", "--output-dir", str(cut)], cut)) == 0
    assert_same(whole, cut)


def printed(output: Path, name: str) -> str:
    """What the latest process that ran in `output` wrote to "stdout" or "stderr"."""
    return output.with_name(f"{output.name}.{name}").read_text(encoding="utf-8")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["rgft", *arguments])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


class CutError(Exception):
    """A run ends here."""


def cut_at_save(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Runs in this process end with `CutError` once they have written so many checkpoints."""
    from rgft.progress import Progress  # noqa: PLC0415 - slow to import

    saved = []

    def on_save(self: Progress, *args: Any, **kwargs: Any) -> None:
        del self, args, kwargs
        saved.append(None)
        if len(saved) == number:
            raise CutError

    monkeypatch.setattr(Progress, "on_save", on_save)


def record_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "run.json").read_text(encoding="utf-8")))


def outcome(output: Path) -> dict[str, Any]:
    """What of a record must not depend on time or on interruptions."""
    record = record_of(output)
    history = [{k: v for k, v in look.items() if k != "seconds"} for look in record.pop("history")]
    timed = ("seconds", "peak_memory_bytes", "started", "finished", "resumed")
    return {**{k: v for k, v in record.items() if k not in timed}, "history": history}


def assert_same(left: Path, right: Path) -> None:
    """Two runs left the same weights, bit by bit, the same error map and the same record."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different, f"weights differ: {different}"
    maps = [pd.read_parquet(folder / "error_map.parquet") for folder in (left, right)]
    pd.testing.assert_frame_equal(*maps, check_exact=True)
    assert outcome(left) == outcome(right)
    assert sorted(p.name for p in left.iterdir()) == sorted(p.name for p in right.iterdir())
