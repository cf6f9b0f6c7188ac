"""A run that is killed, however often and whenever, and resumed, is the run that was not killed."""

from __future__ import annotations

import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from runs import assert_same, finish, printed, record_of, start

METHODS = ("rgft", "rgft-threshold", "rgft-lora")
# 30 steps an epoch; looked at and saved every 15, the loss logged every 10
SHAPE = ["--epochs", "10", "--batch-size", "4", "--evaluations", "2", "--set", "every=7"]
STEPS = 300
LATEST = 60.0  # seconds by which any of these runs has ended
ENDED = "had ended"


def begin(method: str, model: Path, data: Path, output: Path) -> BaseProcess:
    """Start or resume; a run killed before its record exists starts anew."""
    if (output / "run.json").exists():
        return start(["train", "--resume", "--output-dir", str(output)], output)
    given = ["--model", str(model), "--data", str(data), "--method", method]
    return start(["train", *given, *SHAPE, "--output-dir", str(output)], output)


def complete(method: str, model: Path, data: Path, output: Path) -> None:
    """Run to the end, from the start or from where a kill left it."""
    assert finish(begin(method, model, data, output)) == 0, printed(output, "stderr")


def steps_saved(output: Path) -> list[int]:
    """The steps of the checkpoints, partial ones too."""
    folders = (output / "checkpoints").glob("checkpoint-*")
    return sorted(int(folder.name.removeprefix("checkpoint-")) for folder in folders)


def being_written(output: Path) -> bool:
    """Whether a checkpoint is there that has not been written to its end."""
    folders = (output / "checkpoints").glob("checkpoint-*")
    return any(not (folder / "trainer_state.json").exists() for folder in folders)


def kill(process: BaseProcess, output: Path, after: int, jitter: float, *, writing: bool) -> str:
    """Kill `jitter` seconds after step `after` is saved, or at the next moment that one is saved.

    Returns where it hit.
    """
    limit = time.monotonic() + LATEST
    while after and max(steps_saved(output), default=0) < after and process.is_alive():
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.join(jitter)
    while writing and process.is_alive() and not being_written(output):
        assert time.monotonic() < limit
        time.sleep(0.0005)
    if not process.is_alive():
        return ENDED
    process.kill()
    process.join()
    if (output / "run.json").exists() and record_of(output)["status"] == "finished":
        return "while the report was written"
    if not (output / "checkpoints").exists():
        return "before the first checkpoint"
    steps = steps_saved(output)
    saving = " while it was written" if being_written(output) else ""
    return f"checkpoint {steps[-1]}{saving}" if steps else "at the first checkpoint"


@pytest.mark.parametrize("method", METHODS)
def test_two_kills_leave_no_trace(
    method: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    given, killed = (method, tiny_model, tiny_data), tmp_path / "killed"
    complete(*given, tmp_path / "whole")
    rng = random.Random(METHODS.index(method))
    for after, writing in ((15 * rng.randint(1, 9), False), (15 * rng.randint(10, 18), True)):
        place = kill(begin(*given, killed), killed, after, rng.uniform(0, 0.1), writing=writing)
        assert place.startswith("checkpoint")
    complete(*given, killed)
    assert_same(tmp_path / "whole", killed)


def test_kill_before_the_first_checkpoint(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    given, killed = ("rgft", tiny_model, tiny_data), tmp_path / "killed"
    process = begin(*given, killed)
    while not (killed / "run.json").exists():
        assert process.is_alive()
        time.sleep(0.001)
    assert kill(process, killed, 0, 0.0, writing=False) == "before the first checkpoint"
    complete(*given, killed)
    complete(*given, tmp_path / "whole")
    assert_same(tmp_path / "whole", killed)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_kills(method: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """At least seven kills a method, at seeded random moments of the run's whole life."""
    given = (method, tiny_model, tiny_data)
    complete(*given, tmp_path / "whole")
    rng = random.Random(METHODS.index(method))
    kills = 0
    for turn in range(20):
        killed = tmp_path / f"killed{turn}"
        after = 0
        for at in range(rng.randint(1, 4)):
            after = 15 * rng.randint(after // 15, STEPS // 15)
            jitter = rng.uniform(0, 1.5 if after in (0, STEPS) else 0.2)
            process = begin(*given, killed)
            place = kill(process, killed, after, jitter, writing=at % 2 == 1 and after < STEPS)
            print(f"{method}, run {turn}, {jitter:.2f} s after step {after}: {place}")
            kills += place != ENDED
        complete(*given, killed)
        assert_same(tmp_path / "whole", killed)
        print(f"{method}, run {turn}: identical; {kills} kills so far")
        if kills >= 7:
            return
    raise AssertionError(f"only {kills} kills")
