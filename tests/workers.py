"""Work done by several processes of one gloo group, with an end in any case."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runs import CONTEXT, warm_up

Work = Callable[..., Any]


def launch(count: int, work: Work, folder: Path, *given: Any, seconds: float = 300) -> list[Any]:
    """What `work(*given)` returned in each of `count` processes.

    An error in one of them, or more than `seconds`, ends all.
    """
    warm_up()
    processes = begin(count, work, folder, *given)
    wait(processes, seconds)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert all(p.exitcode == 0 for p in processes), [p.exitcode for p in processes]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def begin(count: int, work: Work, folder: Path, *given: Any) -> list[BaseProcess]:
    """Start the processes."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        CONTEXT.Process(target=_worker, args=(rank, count, work, folder, given))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[BaseProcess], seconds: float) -> None:
    """Until all have ended; those that have not by then are killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} processes had not ended after {seconds} s"


def _worker(rank: int, count: int, work: Work, folder: Path, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, and not used
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), **local, **where}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=100),
    )
    try:
        torch.save(work(*given), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"process {rank}: {traceback.format_exc()}")
        os._exit(1)  # its sockets close, so that the others do not wait for it
    dist.destroy_process_group()
    gc.collect()  # as in rgft.launch.leave
