"""The command in several processes, met as a launcher would have them meet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

import runs

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    # on CPUs without MPI its own `--cpu` starts one process
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0"),
    ],
}

THREADS = """
import atexit, contextlib, os, pathlib
def left():
    names = []
    for file in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.append(file.read_text())
    pathlib.Path(os.environ["LEFT"], os.environ.get("RANK", "launcher")).write_text("".join(names))
atexit.register(left)
"""


def with_threads_noted(folder: Path) -> dict[str, str]:
    """An environment in which processes leave the names of their last threads in `folder`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(THREADS)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "LEFT": str(folder)}


class Launched:
    """`rgft` with these arguments in so many processes; what they print goes to files.

    The launcher's store outlives them, as that of `torchrun` does.

    Args:
        arguments: Of the command.
        output: The folder of the run; what it prints goes beside it.
        count: How many.
        last: More arguments, of the last of them.
        environment: Of all.
    """

    def __init__(
        self,
        arguments: list[str],
        output: Path,
        count: int,
        last: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._output = output
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            given = {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)},
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                **(environment or {}),
            }
            more = last if rank == count - 1 else ()
            process = runs.CONTEXT.Process(
                target=_ranked, args=(given, [*arguments, *more], self._folder(rank))
            )
            process.start()
            self.processes.append(process)

    def codes(self, seconds: float = 120) -> list[int]:
        """Exit codes, once all have ended."""
        return [runs.finish(process, seconds) for process in self.processes]

    def printed(self, name: str) -> str:
        """What all of them wrote to "stdout" or "stderr"."""
        folders = map(self._folder, range(len(self.processes)))
        return "".join(runs.printed(folder, name) for folder in folders)

    def _folder(self, rank: int) -> Path:
        return self._output.with_name(f"{self._output.name}-{rank}")


def _ranked(environment: dict[str, str], arguments: list[str], output: Path) -> None:
    os.environ |= environment
    runs._command(arguments, output)
