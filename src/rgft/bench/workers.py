"""Processes on this machine that run cells."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from rgft.bench.cells import Cell
from rgft.bench.execute import CLAIMED, INTERRUPTED, RECORDED, process_cell

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
PRELOADED = ("rgft.train", "rgft.bench.execute", "rgft.report", "peft", "rgft.extensions")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Ended(NamedTuple):
    """A cell whose process has ended, and how: "died" is without a record of its own."""

    cell: Cell
    how: Literal["recorded", "claimed", "interrupted", "died"]
    reason: str = ""


class Workers(Protocol):
    """Where cells run."""

    slots: int

    def start(self, cell: Cell, *, again: bool) -> None:
        """Begin a cell; with `again` even if it has failed before."""

    def ended(self, timeout: float) -> list[Ended]:
        """Wait for cells to end, at most so many seconds."""

    def stop(self) -> None:
        """Have what runs saved, and stop it."""


class LocalWorkers:
    """Up to `slots` cells at a time, each in a process with its own threads.

    Args:
        slots: How many.
        threads: Threads of each.
        bench: Folder of the bench.
        keep: Whether run folders stay.
    """

    def __init__(self, slots: int, threads: int, bench: Path, *, keep: bool = False) -> None:
        self.slots = slots
        self._threads, self._bench, self._keep = threads, bench, keep
        self._running: dict[BaseProcess, Cell] = {}
        for name in THREADS:
            os.environ[name] = str(threads)  # of the processes: read when they import torch
        self._context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            self._context.set_forkserver_preload(list(PRELOADED))

    def start(self, cell: Cell, *, again: bool) -> None:
        """Begin a cell."""
        given = (cell, self._bench, self._threads, self._keep, again)
        process = self._context.Process(target=process_cell, args=given)  # type: ignore[attr-defined]
        process.start()
        self._running[process] = cell

    def ended(self, timeout: float) -> list[Ended]:
        """Wait for cells to end."""
        wait([process.sentinel for process in self._running], timeout)
        over = [process for process in self._running if process.exitcode is not None]
        return [_told(self._running.pop(process), process.exitcode) for process in over]

    def stop(self) -> None:
        """Ask every process to save and stop, and wait until they have."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.join()


def _told(cell: Cell, code: int | None) -> Ended:
    if code == RECORDED:
        return Ended(cell, "recorded")
    if code == CLAIMED:
        return Ended(cell, "claimed")
    if code in (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
        return Ended(cell, "interrupted")
    if code == -signal.SIGKILL:
        return Ended(cell, "died", "killed (SIGKILL: by someone, or for want of memory)")
    return Ended(cell, "died", f"its process ended with exit code {code}")
