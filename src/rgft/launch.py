"""The processes that a launcher has started for one command, and how they end together."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from rgft.errors import InputError
from rgft.processes import Processes

T = TypeVar("T")
ENGINES = {  # what `accelerate launch` asks for by the environment
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "other kinds of parallelism",
}
CHOSEN_HERE = {
    "ACCELERATE_MIXED_PRECISION": "--mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "--dynamo_backend",
}
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
LOST = ("connection", "gloo", "nccl", "timed out", "socket")  # in what a collective says


def launched() -> int:
    """How many processes were started together; 1 if the environment says it unreadably."""
    return int(said) if (said := os.environ.get("WORLD_SIZE", "1")).isdecimal() else 1


def leads() -> bool:
    """Whether this is the process that writes and shows things."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, slots=True)
class Launch:
    """The processes of a command.

    Attributes:
        processes: What they agree by; None where there is one.
    """

    processes: Processes | None = None

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.processes is None else self.processes.size

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.processes is None or self.processes.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process; what is wrong in one is said in all.

        Raises:
            InputError: From `work`, here or elsewhere.
        """
        if self.processes is None:
            return work()
        result, problem = None, ""
        try:
            result = work()
        except InputError as error:
            problem = str(error)
        problem = next(filter(None, self.processes.lists([problem])), "")
        if problem:
            raise InputError(problem)
        return result  # type: ignore[return-value] # there was no error

    def alone(self, work: Callable[[], object]) -> None:
        """Do `work` in the first process, while the others wait.

        Raises:
            InputError: From `work`.
        """
        self.together(lambda: work() if self.first else None)

    def told(self, work: Callable[[], str]) -> str:
        """What `work` returns in the first process, in all of them.

        Raises:
            InputError: From `work`.
        """
        found = self.together(lambda: work() if self.first else "")
        return found if self.processes is None else self.processes.lists([found])[0]

    def refuse_different(self, what: str, text: str) -> None:
        """Refuse, in all processes, what is not the same in all of them.

        Raises:
            InputError: It is not.
        """
        if self.processes is not None:
            self.processes.refuse_different(what, text)


def join() -> Launch:
    """Meet the other processes.

    Raises:
        InputError: The launcher asks for what a run cannot do.
    """
    _check_launcher()
    if launched() == 1:
        return Launch()
    if not dist.is_initialized():
        backend = None if torch.accelerator.is_available() else "gloo"
        rank = int(os.environ.get("RANK", "0"))
        dist.init_process_group(
            backend, store=PrefixStore("group", _store()), rank=rank, world_size=launched()
        )
    return Launch(Processes())


def _check_launcher() -> None:
    """Refuse what a launcher asks for behind the back of the command."""
    for variable in ("WORLD_SIZE", "RANK"):
        if not os.environ.get(variable, "1").isdecimal():
            raise InputError(
                f"{variable} is {os.environ[variable]!r} in the environment; it has to be a "
                "number: start rgft train with torchrun or accelerate launch, or unset it"
            )
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "false").lower() not in ("false", "0", ""):
            raise InputError(
                f"the launcher asks for {engine}, and rgft train shares batches out to copies of "
                "the whole model (DDP): start it with torchrun, or accelerate launch --multi_gpu; "
                "Guide works with FSDP2 in a loop of your own"
            )
    for variable, option in CHOSEN_HERE.items():
        if os.environ.get(variable, "no").lower() not in ("no", ""):
            raise InputError(
                f"the launcher was given {option} {os.environ[variable]}, which the record of the "
                "run would not tell; drop it (rgft train has --precision)"
            )


def leave() -> None:
    """Part from the other processes at the end of a run, where there are some; see `end_now`.

    The threads of a gloo group end with the last object that holds the group, and models and guides
    are often held by cycles of references alone by now. A thread that is still there when the
    interpreter goes can abort the process (pytorch/pytorch#190489).
    """
    if launched() > 1 and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def end_now(error: BaseException) -> None:
    """End this process at once if an error ends it while it is one of several that have met.

    Whoever lets go of a gloo group waits for its threads, and these may be in a collective that the
    others never join. Left alone, they can abort the interpreter at its end, which replaces the
    exit code. So there is no such end.

    Args:
        error: What ends it, which is printed unless it is a `SystemExit`.
    """
    if launched() == 1 or not dist.is_initialized():
        return
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # no one may be left who reads it
            stream.flush()
    code = (error.code or 0) if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) else 1)


def claim_last_word(code: int) -> bool:
    """Claim the right to say why the command ends; whether this process, as the first, has got it.

    Args:
        code: With which it will end, and the others then, too.
    """
    if launched() == 1:
        return True
    mine = f"{os.environ.get('RANK', '0')} {code}"
    try:
        return bytes(_store().compare_set("end", "", mine)).decode() == mine
    except InputError:  # they have not met
        return leads()
    except RuntimeError:  # no one is left who could have told it
        return True


def ended_elsewhere() -> int | None:
    """The exit code of another process that has said why the command ends."""
    if launched() == 1:
        return None
    with contextlib.suppress(RuntimeError, InputError):
        if _store().check(["end"]):
            rank, code = _store().get("end").decode().split()
            return None if rank == os.environ.get("RANK", "0") else int(code)
    return None


def lost_another(error: BaseException) -> bool:
    """Whether an error is what a collective says when another process has ended."""
    text = str(error).lower()
    return launched() > 1 and isinstance(error, RuntimeError) and any(w in text for w in LOST)


@functools.cache
def _store() -> Store:
    """Where the processes leave notes to each other."""
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {launched()}, but {missing[0]} is not set: start rgft train with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    store, _, _ = next(iter(rendezvous("env://")))
    # a launcher that restarts its processes keeps the store
    return PrefixStore(f"rgft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
