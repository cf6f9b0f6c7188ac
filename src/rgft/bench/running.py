"""Run what of a suite is missing, and say how far it is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rgft.bench.cells import Cell, Record, by_key, count, settled
from rgft.bench.journal import FILE, append_record, read_cells
from rgft.bench.suite import Suite
from rgft.bench.workers import Ended, Workers
from rgft.report import amounts

POLL = 2.0  # seconds between looks at cells that another process has claimed


class Outcome(NamedTuple):
    """How far a suite is: numbers of cells, and the records of those that failed."""

    total: int
    finished: int
    failed: list[Record]


def run_suite(
    suite: Suite,
    folder: Path,
    workers: Workers,
    *,
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Runs every cell that has no record yet; returns when none is left.

    Args:
        suite: What to run.
        folder: Where records are; made if it is missing.
        workers: Where cells run.
        retry_failed: Whether cells that have failed before run again.
        say: Gets a line for each cell that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(suite, folder, workers, retry_failed, say)
    try:
        while state.step():
            pass
    finally:
        workers.stop()
    return outcome(suite, by_key(read_cells(folder / FILE)))


def outcome(suite: Suite, records: dict[str, Record]) -> Outcome:
    """How far a suite is by its records."""
    done, _ = settled(suite, records)
    failed = [records[cell.key] for cell in done if records[cell.key]["status"] == "failed"]
    return Outcome(count(suite), len(done) - len(failed), failed)


class _State:
    """One call's view of what runs, waits and is to be tried again."""

    def __init__(
        self, suite: Suite, folder: Path, workers: Workers, retry: bool, say: Callable[[str], None]
    ) -> None:
        self._suite, self._folder, self._workers, self._say = suite, folder, workers, say
        self._running: dict[str, Cell] = {}
        self._elsewhere: dict[str, float] = {}
        self._stopped: set[str] = set()
        records = by_key(read_cells(folder / FILE))
        failed = {key for key, record in records.items() if record["status"] == "failed"}
        self._again = failed if retry else set()
        self._due: list[Cell] = []
        self._bytes_read = -1

    def step(self) -> bool:
        """Start what can start, wait for something to end; False when nothing is left."""
        self._look()
        waiting = [cell for cell in self._due if cell.key not in self._stopped]
        now = time.monotonic()
        for cell in waiting:
            free = self._workers.slots - len(self._running)
            held = now - self._elsewhere.get(cell.key, -POLL) < POLL
            if free > 0 and cell.key not in self._running and not held:
                self._workers.start(cell, again=cell.key in self._again)
                self._running[cell.key] = cell
        if not waiting and not self._running:
            return False
        if self._running:
            for end in self._workers.ended(POLL):
                self._note(end)
        else:
            time.sleep(POLL)
        return True

    def _look(self) -> None:
        """Which cells are due; found anew when a cell has ended, or the file has other records."""
        path = self._folder / FILE
        size = path.stat().st_size if path.exists() else 0
        if size != self._bytes_read:
            _, self._due = settled(self._suite, self._records())
            self._bytes_read = size

    def _records(self) -> dict[str, Record]:
        records = by_key(read_cells(self._folder / FILE))
        return {key: record for key, record in records.items() if key not in self._again}

    def _note(self, end: Ended) -> None:
        key = end.cell.key
        del self._running[key]
        self._bytes_read = -1
        if end.how == "claimed":
            self._elsewhere[key] = time.monotonic()
            return
        if end.how == "interrupted":
            self._stopped.add(key)
            self._say(f"{end.cell}: stopped; a further call goes on with it")
            return
        if end.how == "died":
            labels = {"status": "failed", "key": key, **end.cell.labels}
            append_record(self._folder / FILE, {**labels, "reason": end.reason, "seconds": {}})
        self._again.discard(key)
        records = self._records()
        # others may have their records, too, and are told of when their processes end
        done = [c for c in settled(self._suite, records)[0] if c.key not in self._running]
        left = time_left([records[c.key] for c in done], count(self._suite), self._workers.slots)
        ahead = f"; about {amounts.duration(left)} left" if left else ""
        place = f"[{len(done)}/{count(self._suite)}]"
        log = self._folder / "logs" / f"{key}.txt"
        printed = f"; see {log}" if log.exists() and records[key]["status"] == "failed" else ""
        self._say(f"{place} {end.cell}: {told(records[key])}{printed}{ahead}")


def told(record: Record) -> str:
    """A record in a few words."""
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    score = record["metrics"]["validation"][record["metric"]]
    seconds = amounts.duration(total_seconds(record))
    share = amounts.share(record["flops"]["share"])
    said = "; the method made no decision" if record.get("idle") else ""
    said += "; went on from a checkpoint" if _went_on(record) else ""
    quality = f"validation {record['metric']} {amounts.metric(score)}"
    return f"{quality}, {share} of FLOPs, {seconds}{said}"


def _went_on(record: Record) -> bool:
    """Whether a resume found a checkpoint; without one it begins anew."""
    return any(resumed["step"] for resumed in record.get("resumed", ()))


def total_seconds(record: Record) -> float:
    """Seconds of a cell, evaluation included."""
    seconds = record["seconds"]
    parts = ("train", "evaluate", "prepare")
    return float(seconds.get("wall") or sum(seconds.get(part) or 0.0 for part in parts))


def time_left(records: Iterable[dict[str, Any]], total: int, slots: int) -> float | None:
    """Seconds until `total` cells are done, if those to come take as long as those that are.

    >>> time_left([{"seconds": {"train": 4.0}}, {"seconds": {"train": 6.0}}], 5, 2)
    10.0
    """
    seconds = [total_seconds(record) for record in records]
    if not seconds:
        return None
    return statistics.fmean(seconds) * math.ceil(max(0, total - len(seconds)) / slots)
