"""Cells on the machines of a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rgft.bench.cells import Cell
from rgft.bench.execute import claim, execute, has_record
from rgft.bench.journal import FILE, append_record
from rgft.bench.workers import THREADS, Ended
from rgft.errors import InputError

LOCAL = "local"
STORE = 100 << 20  # bytes; records are small


class RayWorkers:
    """Up to `slots` cells at a time, each in a process of its own that Ray starts.

    The claims and the records are here; a cell's run is in a temporary folder where it runs, so
    that one which is stopped starts anew. Models, data and files of --extend must be at the same
    paths everywhere.

    Args:
        address: "local" for this machine alone, "auto" or an address for a cluster.
        slots: How many.
        threads: Threads of each.
        bench: Folder of the bench.
    """

    def __init__(self, address: str, slots: int, threads: int, bench: Path) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise InputError("--ray needs Ray: pip install 'rgft[ray]'") from error
        self.slots = slots
        self._ray, self._bench = ray, bench
        self._running: dict[Any, tuple[Cell, FileLock]] = {}
        self._told: list[Ended] = []
        here: dict[str, Any] = {"num_cpus": slots * threads, "object_store_memory": STORE}
        given = here if address == LOCAL else {"address": address}
        variables = {name: str(threads) for name in THREADS}
        ray.init(
            **given,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": variables},
        )
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # a process for each cell, as peak memory is one of a process; never run twice by itself
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=0)
        self._remote, self._threads = remote(_remote), threads

    def start(self, cell: Cell, *, again: bool) -> None:
        """Begin a cell, unless another bench has it."""
        lock = claim(self._bench, cell)
        try:
            lock.acquire()
        except Timeout:
            self._told.append(Ended(cell, "claimed"))
            return
        if has_record(self._bench, cell, failed_too=not again):
            lock.release()
            self._told.append(Ended(cell, "recorded"))
            return
        self._running[self._remote.remote(cell, self._threads)] = cell, lock

    def ended(self, timeout: float) -> list[Ended]:
        """Wait for cells to end, and write their records."""
        told, self._told = self._told, []
        if self._running and not told:
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
            told = [self._collected(reference) for reference in ready]
        return told

    def stop(self) -> None:
        """Stop what runs."""
        for reference, (_, lock) in self._running.items():
            self._ray.cancel(reference, force=True)
            lock.release()
        self._running.clear()
        self._ray.shutdown()

    def _collected(self, reference: Any) -> Ended:
        cell, lock = self._running.pop(reference)
        try:
            record = self._ray.get(reference)
            if record is None:
                return Ended(cell, "interrupted")
            append_record(self._bench / FILE, record)
            return Ended(cell, "recorded")
        except self._ray.exceptions.RayError as error:
            return Ended(cell, "died", " ".join(str(error).split())[:300])
        finally:
            lock.release()


def _remote(cell: Cell, threads: int) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        return execute(cell, Path(folder) / "run", threads)
