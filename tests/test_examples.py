"""The examples run from their first line to their last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_chat
from bench_runs import whole
from launches import LAUNCHERS, with_threads_noted
from rgft.bench.journal import read_records
from rgft.error_map import ErrorMap

FOLDER = Path(__file__).parent.parent / "examples"
OWN = ("own_method.py", "own_task.py")
PRINTED = {
    "plain_loop.py": "error map after step 12",
    "trainer.py": "the plan after 12 steps",
    "lora.py": "LoRA pairs after step 12",
    "sft.py": "LoRA pairs after step 12",
}


def given(name: str, folder: Path) -> list[str]:
    """What an example needs besides its steps."""
    if name != "sft.py":
        return []
    rows = folder / "chats.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_chat.rows()), "utf-8")
    return ["--model", str(tiny_chat.build(folder / "llama")), "--data", str(rows)]


def run_example(name: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", str(FOLDER / name), "--steps", "12"]
    command += given(name, folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*PRINTED, *OWN, "distributed.py"}


def test_own_method_and_task_run_in_a_suite(tiny_model: Path, tmp_path: Path) -> None:
    """The suite is the last one in docs/benchmarks.md."""
    page = (FOLDER.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    suite = page.split("```yaml\n")[-1].split("```")[0]
    given = f"models: [{{name: tiny, path: '{tiny_model}'}}]\noptions: {{epochs: 2}}\n"
    (tmp_path / "own.yaml").write_text(given + suite, encoding="utf-8")
    files = [part for name in OWN for part in ("--extend", str(FOLDER / name))]
    code, _, err = whole(tmp_path / "own.yaml", tmp_path / "out", *files)
    assert code == 0, err
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert {(r["arm"], r["task"], r["seed"]) for r in records} == {
        (arm, "larger-than-ten", seed) for arm in ("full", "above-mean") for seed in (0, 1)
    }
    assert all(len((FOLDER / name).read_text().splitlines()) < 40 for name in OWN)


@pytest.mark.parametrize("name", PRINTED)
def test_example_runs(name: str, tmp_path: Path) -> None:
    assert PRINTED[name] in run_example(name, tmp_path)
    if name == "plain_loop.py":
        error_map = ErrorMap.from_parquet(tmp_path / "error_map.parquet")
        assert error_map.history.steps.tolist() == list(range(1, 13))


@pytest.mark.parametrize(
    ("launcher", "sharded"), [("torchrun", []), ("torchrun", ["--sharded"]), ("accelerate", [])]
)
def test_example_of_many_processes_runs(launcher: str, sharded: list[str], tmp_path: Path) -> None:
    script = str(FOLDER / "distributed.py")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], script, *sharded]
    environment = with_threads_noted(tmp_path / "left")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # process 0 alone prints
    assert line.startswith("20 steps, 99% of the budget")
    left = [(tmp_path / "left" / rank).read_text() for rank in "01"]
    assert all("python" in names for names in left)
    assert sharded or not any("gloo" in names for names in left)  # PyTorch keeps meshes for good
