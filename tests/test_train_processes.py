"""`rgft train` in several processes does what it does in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
import tiny_texts
from launches import LAUNCHERS, Launched, with_threads_noted
from runs import assert_same, call, finish, record_of, start, warm_up

ROWS = {"train": 75, "validation": 41, "test": 23}  # the last batches divide by no 2
COMMON = ["--epochs", "2", "--batch-size", "8", "--evaluations", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model without dropout, whose masks no two numbers of processes could share."""
    folder = tmp_path_factory.mktemp("given")
    model = tiny_run.build_model(folder / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    data = tiny_run.build_data(folder / "data", rows=ROWS)
    warm_up()
    return ["train", "--model", str(model), "--data", str(data), *COMMON]


def one(arguments: list[str], output: Path) -> dict[str, Any]:
    assert finish(start([*arguments, "--output-dir", str(output)], output)) == 0
    return record_of(output)


def many(arguments: list[str], output: Path, count: int) -> dict[str, Any]:
    launched = Launched([*arguments, "--output-dir", str(output)], output, count)
    assert launched.codes() == [0] * count, launched.printed("stderr")
    assert launched.printed("stdout").count("report: ") == 1  # the first process alone prints
    return record_of(output)


def stopped(arguments: list[str], output: Path, count: int) -> None:
    """Begin it, and stop it as a launcher does that was stopped with Ctrl-C."""
    launched = Launched([*arguments, "--output-dir", str(output)], output, count)
    _wait_for_checkpoint(launched, output)
    for process in launched.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    assert launched.codes() == [1] * count, launched.printed("stderr")
    (line,) = said(launched)
    assert "stopped and saved at step" in line
    record = record_of(output)
    assert record["status"] == "interrupted"
    assert 3 < record["step"] < LONG_STEPS


def said(launched: Launched) -> list[str]:
    """Lines on standard error, but for what DistributedDataParallel remarks on itself."""
    lines = launched.printed("stderr").splitlines()
    return [line for line in lines if "reducer.cpp" not in line]


def _wait_for_checkpoint(launched: Launched, output: Path) -> None:
    while not list((output / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert all(p.is_alive() for p in launched.processes), launched.printed("stderr")
        time.sleep(0.005)


def assert_equal(ours: Path, theirs: Path) -> None:
    """Weights to 1e-5, the same plans, FLOPs and visits, and metrics."""
    left, right = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=0, atol=1e-5)
    maps = [pd.read_parquet(folder / "error_map.parquet") for folder in (ours, theirs)]
    pd.testing.assert_frame_equal(*maps, check_exact=False, rtol=1e-3, atol=1e-6)
    ledgers = [pd.read_parquet(folder / "residuals.parquet") for folder in (ours, theirs)]
    pd.testing.assert_frame_equal(*ledgers, check_exact=False, rtol=1e-3, atol=1e-5)
    records = [record_of(folder) for folder in (ours, theirs)]
    for key in ("flops", "visits", "rows", "parameters", "budget_auto", "survey", "config"):
        assert records[0][key] == records[1][key], key
    for key in ("metrics", "history", "train_loss"):
        close(records[0][key], records[1][key])


def close(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, dict):
        for key in left.keys() - {"seconds"}:
            close(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, pair in enumerate(zip(left, right, strict=True)):
            close(*pair, f"{path}[{i}]")
    else:
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5), path


CASES = {
    "threshold": ["--method", "rgft-threshold", "--set", "every=2", "--set", "warmup=2"],
    "budget": ["--budget", "0.5", "--skip", "0.3", "--balance", "0.5", "--prefix-cache", "off"],
    "auto": ["--method", "rgft-threshold", "--set", "every=2", "--budget", "auto"],
    "lora": ["--method", "rgft-lora"],
    "samples": ["--method", "rgft", "--set", "signal=fisher", "--set", "every=4"],
}


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_texts_to_write_weigh_by_their_tokens(tmp_path: Path, kind: str) -> None:
    """Answers differ in length, so that a mean over rows would be another one."""
    model = tiny_texts.build_model(tmp_path / "model", kind)
    data = tiny_texts.build_data(tmp_path / "data", ROWS)
    arguments = ["train", "--model", str(model), "--data", str(data), *COMMON]
    arguments += ["--target-column", "summary", "--max-length", "16", "--max-target-length", "8"]
    arguments += ["--method", "rgft", "--budget", "0.6", "--written-rows", "20"]
    apart, together = tmp_path / "one", tmp_path / "two"
    one(arguments, apart)
    many(arguments, together, 2)
    assert_equal(apart, together)
    texts = [(folder / "written.jsonl").read_text() for folder in (apart, together)]
    assert texts[0] == texts[1] and texts[0].count("\n") == 40


LONG = ["--epochs", "6", "--method", "rgft-threshold", "--set", "every=3"]
LONG_STEPS = 6 * 10


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(case: str, given: list[str], tmp_path: Path) -> None:
    arguments = [*given, *CASES[case]]
    one(arguments, tmp_path / "one")
    record = many(arguments, tmp_path / "two", 2)
    assert record["hardware"]["processes"] == 2
    assert_equal(tmp_path / "two", tmp_path / "one")


def test_a_process_without_a_row_of_a_short_batch_waits(given: list[str], tmp_path: Path) -> None:
    one(given, tmp_path / "one")
    many(given, tmp_path / "four", 4)  # the last batch has 3 rows
    assert_equal(tmp_path / "four", tmp_path / "one")


@pytest.mark.parametrize("budget", [[], ["--budget", "1"]], ids=["epochs", "budget"])
def test_stopped_and_resumed_on_as_many_it_is_the_run(
    budget: list[str], tiny_model: Path, given: list[str], tmp_path: Path
) -> None:
    given = [*given, *LONG, *budget, "--model", str(tiny_model)]  # which has dropout
    many(given, tmp_path / "whole", 2)
    stopped(given, tmp_path / "parts", 2)
    many(["train", "--resume"], tmp_path / "parts", 2)
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_it_goes_on_on_another_number_of_processes(
    before: int, after: int, given: list[str], tmp_path: Path
) -> None:
    given = [*given, *LONG, "--budget", "1", "--prefix-cache", "off"]
    one(given, tmp_path / "one")
    stopped(given, tmp_path / "parts", before)
    many(["train", "--resume"], tmp_path / "parts", after)
    assert_equal(tmp_path / "parts", tmp_path / "one")
    (resumed,) = record_of(tmp_path / "parts")["resumed"]
    assert resumed["hardware"]["processes"] == after


def test_a_killed_process_ends_all_and_the_run_goes_on(given: list[str], tmp_path: Path) -> None:
    given, output = [*given, *LONG], tmp_path / "parts"
    one(given, tmp_path / "one")
    launched = Launched([*given, "--output-dir", str(output)], output, 2)
    _wait_for_checkpoint(launched, output)
    launched.processes[1].kill()
    assert launched.codes(60) == [1, -signal.SIGKILL]
    (line,) = said(launched)
    assert "another process of the run has ended" in line
    assert "Traceback" not in launched.printed("stderr")
    many(["train", "--resume"], output, 1)
    assert_equal(output, tmp_path / "one")


REFUSED = {
    "batch": (["--batch-size", "7"], (), {}, "cannot be shared out evenly to 2 processes"),
    "cache": (
        ["--set", "frozen_below=2", "--prefix-cache", "int8"],
        (),
        {},
        "works in one process",
    ),
    "ranks": (["--method", "adalora"], (), {}, "chooses ranks by what one process sees"),
    "hard": (
        *(["--method", "selective-backprop", "--budget", "0.5"], (), {}),
        "chooses samples of a batch by what one process sees",
    ),
    "unknown": (["--method", "no-such"], (), {}, "no-such"),
    "option": (["--no-such"], (), {}, "No such option"),
    "last": ([], ["--label-column", "no-such"], {}, "has another command than process 0"),
    "fsdp": ([], (), {"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
    "deepspeed": ([], (), {"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
    "precision": ([], (), {"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision bf16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_once_and_ends_all(
    case: str, given: list[str], tmp_path: Path
) -> None:
    more, last, environment, message = REFUSED[case]
    output = tmp_path / "run"
    arguments = [*given, *more, "--output-dir", str(output)]
    launched = Launched(arguments, output, 2, last, environment)
    assert launched.codes() == [2, 2], launched.printed("stderr")
    (line,) = said(launched)
    assert message in line
    assert launched.printed("stdout") == ""
    assert not output.exists()


FULL_DISK = """
import os, resource
if os.environ["RANK"] == "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))
METHODS = {}
"""


def test_a_disk_that_is_full_for_one_ends_all(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL_DISK)
    output = tmp_path / "run"
    arguments = [*given, "--extend", str(tmp_path / "full.py"), "--output-dir", str(output)]
    launched = Launched(arguments, output, 2)
    assert launched.codes() == [2, 2], launched.printed("stderr")
    (line,) = said(launched)
    assert "cannot write to" in line


ENDED = """
import atexit, os, sys, torch.distributed as dist
from rgft import cli
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
os.environ["WORLD_SIZE"] = "2"
atexit.register(print, "ended by the interpreter")
sys.argv = ["rgft", "train", "--output-dir", "x", "--no-such"]
if sys.stdin.read():
    cli.app = lambda **given: {}["no such key"]
cli.main()
"""


@pytest.mark.parametrize("unexpected", ["", "yes"])
def test_an_error_ends_a_process_that_has_met_others_at_once(unexpected: str) -> None:
    """The interpreter's own end may wait for threads of the group, or be aborted by them.

    Whether it does is up to chance; looked at is that there is no such end.
    """
    command = [sys.executable, "-c", ENDED]
    done = subprocess.run(command, input=unexpected, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if unexpected else 2)
    assert ("KeyError: 'no such key'" if unexpected else "No such option") in done.stderr
    assert done.stderr.count("Traceback") == bool(unexpected)
    assert done.stdout == ""


def test_without_a_prefix_cache_it_says_so(given: list[str], tmp_path: Path) -> None:
    chosen = ["--budget", "0.5", "--set", "frozen_below=2"]
    arguments = [*given, *chosen, "--output-dir", str(tmp_path / "run")]
    launched = Launched(arguments, tmp_path / "run", 2)
    assert launched.codes() == [0, 0]
    (line,) = said(launched)
    assert line.startswith("rgft: note: prefix_cache works in one process")


def test_bench_starts_its_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = str(tmp_path / "out")
    assert call(monkeypatch, "bench", str(tmp_path / "any.yaml"), "--output-dir", output) == 2
    assert "rgft bench was started in 2 processes" in capsys.readouterr().err


def test_a_precision_that_only_the_launcher_knows_of_is_refused_in_one_process(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert call(monkeypatch, *given, "--output-dir", str(tmp_path / "run")) == 2
    assert "rgft train has --precision" in capsys.readouterr().err


def test_processes_that_no_launcher_started(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(monkeypatch, *given, "--output-dir", str(tmp_path / "run")) == 2
    assert "RANK is not set" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK"])
def test_an_environment_that_no_launcher_made(
    variable: str,
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "two")
    assert call(monkeypatch, *given, "--output-dir", str(tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{variable} is 'two' in the environment" in line


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, given: list[str], tmp_path: Path) -> None:
    one(given, tmp_path / "one")
    module = ["--module"] if launcher == "accelerate" else ["-m"]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *module, "rgft.cli", *given]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "two")],
        env=with_threads_noted(tmp_path / "left"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert_equal(tmp_path / "two", tmp_path / "one")
    left = [(tmp_path / "left" / rank).read_text() for rank in "01"]
    assert all("python" in names and "gloo" not in names for names in left)
