"""Run one cell to its record, in a process of its own.

A process for each cell, since peak memory is one of a process, a crash must not take the others
along, and the number of threads has to be set before anything computes. Processes are forked from a
server that has imported everything (on Linux), so that one costs no start-up time.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rgft.bench.cells import Cell, by_key
from rgft.bench.journal import FILE, append_record, read_cells
from rgft.bench.record import record_of_run
from rgft.bench.suite import in_suite
from rgft.errors import InputError
from rgft.records import RUN_FILE

RECORDED, CLAIMED, INTERRUPTED = 0, 10, 11  # exit codes of a cell's process


def execute(cell: Cell, folder: Path, threads: int) -> dict[str, Any] | None:
    """Trains, going on where an earlier attempt in `folder` was; None if it was interrupted.

    A run that fails has a record, too: `status` is "failed", and there is a `reason`.
    """
    import torch  # noqa: PLC0415 - a server of processes imports it, and no one else here needs it

    from rgft.notes import afterwards, notes_at_once  # noqa: PLC0415
    from rgft.train import run  # noqa: PLC0415

    torch.set_num_threads(threads)
    start, labels = time.perf_counter(), {"key": cell.key, **cell.labels}
    try:
        resume = (folder / RUN_FILE).exists()
        with notes_at_once() as notes:
            result = run(cell.spec, folder, resume=resume)
        if result["status"] == "interrupted":
            return None
        said = [in_suite(" ".join(text.split())) for text in (*notes, *afterwards(result))]
        return {"status": "finished", **labels, **record_of_run(folder), **labels, "notes": said}
    except KeyboardInterrupt:
        return None
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = f"{kind}{in_suite(' '.join(str(error).split()))}"
        seconds = time.perf_counter() - start
        return {"status": "failed", **labels, "reason": reason, "seconds": {"wall": seconds}}


def claim(bench: Path, cell: Cell) -> FileLock:
    """The lock on a cell; the system lets go of it when its process ends, however it ends."""
    folder = bench / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{cell.key}.lock", timeout=0)


def has_record(bench: Path, cell: Cell, *, failed_too: bool) -> bool:
    """Whether the cell is settled, as far as the records on disk say now."""
    record = by_key(read_cells(bench / FILE)).get(cell.key)
    return record is not None and (failed_too or record["status"] != "failed")


def process_cell(cell: Cell, bench: Path, threads: int, keep: bool, again: bool) -> None:
    """What a cell's process does: claim, run, record, clear up. Ends with one of the exit codes."""
    folder, log = bench / "runs" / cell.key, bench / "logs" / f"{cell.key}.txt"
    for parent in (folder.parent, log.parent):
        parent.mkdir(parents=True, exist_ok=True)
    os.setpgid(0, 0)  # Ctrl-C reaches the bench alone, which asks its cells to stop
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        with claim(bench, cell):
            if has_record(bench, cell, failed_too=not again):
                sys.exit(RECORDED)
            _write_output_to(log)
            record = execute(cell, folder, threads)
            if record is None:
                sys.exit(INTERRUPTED)
            append_record(bench / FILE, record)
            if record["status"] == "finished":
                log.unlink()
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        sys.exit(CLAIMED)


def _write_output_to(log: Path) -> None:
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(opened, stream)


def _stop_with_parent() -> None:
    """When the bench is gone, save and stop, so that nothing goes on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
