"""Suites run, go on after kills, and never run a cell twice."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench_runs import bench, build, whole
from rgft.bench.journal import FILE, read_records

# leaves a trace of each decision, by a function that shares nothing with the bench
WITNESS = """
import os, time, torch, rgft

def witness(situation):
    with open({trace!r}, "a") as file:
        file.write(f"{{os.getppid()}} {{os.getpid()}} {{situation.step}}\\n")
    time.sleep(0.02)
    return torch.ones_like(situation.error)

METHODS = {{
    "witness": rgft.Method("uniform", rgft.Config(policy=rgft.Policy(witness), every=1, warmup=0))
}}
"""
SUITE = """
models: [model]
tasks: [data]
seeds: [0, 1, 2]
rates: [1.0e-3, 3.0e-3]
options: {epochs: 2, batch_size: 4, evaluations: 4}
arms:
  witness: {}
"""
CELLS, STEPS = 4, 16  # of the suite; of a cell, with a checkpoint every 2


def stable(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record must not depend on where, when and after how many kills it ran."""
    timed = ("seconds", "peak_memory_bytes", "started", "finished", "resumed", "history")
    timed = (*timed, "code_revision")  # of a tree that may be worked on meanwhile
    return {name: value for name, value in record.items() if name not in timed}


def by_key(output: Path) -> dict[str, dict[str, Any]]:
    records = read_records(output / FILE)
    assert len({record["key"] for record in records}) == len(records), "a cell has two records"
    return {record["key"]: stable(record) for record in records}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny.yaml, run with one worker, in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    code, out, err = whole(build(folder), folder / "out")
    assert code == 0, err
    assert "10 finished, 0 failed" in out
    return folder


def test_a_suite_sweeps_at_the_first_seed_and_goes_on_at_the_best_rate(finished: Path) -> None:
    records = read_records(finished / "out" / FILE)
    ran = Counter((r["arm"], r["budget"], r["seed"]) for r in records)
    for budget in (0.5, 1.0):
        swept = [r for r in records if (r["arm"], r["budget"]) == ("full", budget)]
        at_first = {
            r["rate"]: r["metrics"]["validation"]["accuracy"] for r in swept if not r["seed"]
        }
        assert len(at_first) == 2
        (later,) = [r for r in swept if r["seed"] == 1]
        best = max(at_first.values())
        assert later["rate"] == min(rate for rate, score in at_first.items() if score == best)
        assert ran["rgft-threshold", budget, 0] == ran["rgft-threshold", budget, 1] == 1
    spent = {r["budget"]: r["flops"]["share"] for r in records if r["arm"] == "full"}
    assert spent[1.0] == 1.0 and abs(spent[0.5] - 0.5) < 0.1


def test_records_have_what_they_promise(finished: Path) -> None:
    promised = (
        *("method", "task", "model", "seed", "lr", "budget", "metrics", "flops", "seconds"),
        *("peak_memory_bytes", "versions", "hardware", "command", "code_revision", "error_map"),
    )
    for record in read_records(finished / "out" / FILE):
        assert [name for name in promised if name not in record] == []
        assert record["hardware"]["threads"] == 1
        assert record["command"].startswith("rgft train --model ./model --data ./data --method ")
        assert record["chance"].keys() == record["metrics"].keys()
        for split, chance in record["chance"].items():
            rows = (finished / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            labels = [json.loads(row)["label"] for row in rows]
            assert chance == {"value": max(map(labels.count, labels)) / len(labels), "rows": 8}


def test_a_second_call_runs_nothing(finished: Path) -> None:
    before = (finished / "out" / FILE).read_bytes()
    same = shutil.copy(finished / "tiny.yaml", finished / "a suite.yaml")
    code, out, err = whole(same, finished / "out")
    assert code == 0 and "10 finished" in out and "[" not in out
    assert f"{finished / 'out'} has records of tiny, too" in err
    _, _, advice = out.strip().partition("see it with: ")
    assert shlex.split(advice)[2:] == [str(finished / "out"), "--output", "a suite.html"]
    assert (finished / "out" / FILE).read_bytes() == before


def test_two_benches_at_once_share_the_cells(finished: Path) -> None:
    output = finished / "shared"
    both = [bench(finished / "tiny.yaml", output, "--workers", "2") for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert by_key(output) == by_key(finished / "out")


@pytest.mark.slow
def test_ray_gives_the_same_records(finished: Path) -> None:
    pytest.importorskip("ray")
    arm = "arms: {rgft-threshold: {settings: {every: 2, warmup: 2}}}\n"
    head = (finished / "tiny.yaml").read_text(encoding="utf-8").split("arms:")[0]
    text = head.replace("[0.5, 1.0]", "[0.5]").replace("[1.0e-3, 3.0e-3]", "[1.0e-3]")
    (finished / "ray.yaml").write_text("name: tiny\n" + text + arm, encoding="utf-8")
    given = ("--workers", "2", "--ray", "local")
    code, _, err = whole(finished / "ray.yaml", finished / "ray", *given)
    assert code == 0, err
    ours, theirs = by_key(finished / "ray"), by_key(finished / "out")
    assert len(ours) == 2
    for key, record in ours.items():
        other = theirs[key]
        assert {**record, "extends": 0, "changes": 0} == {**other, "extends": 0, "changes": 0}


def test_a_failed_cell_is_recorded_and_left_until_asked(tmp_path: Path) -> None:
    text = SUITE.replace("witness: {}", "full: {keep_layers: 9}").replace("1.0e-3, 3.0e-3", "1e-3")
    suite = build(tmp_path, text.replace("[0, 1, 2]", "[0]"))
    code, out, err = whole(suite, tmp_path / "out")
    (record,) = read_records(tmp_path / "out" / FILE)
    assert code == 1 and record["status"] == "failed" and record["reason"] in err
    log = tmp_path / "out" / "logs" / f"{record['key']}.txt"
    assert f"; see {log}" in out and "Traceback" in log.read_text(encoding="utf-8")
    code, out, _ = whole(suite, tmp_path / "out")
    assert code == 1 and "0 to run" in out
    assert len(read_records(tmp_path / "out" / FILE)) == 1
    assert whole(suite, tmp_path / "out", "--retry-failed")[0] == 1
    assert len(read_records(tmp_path / "out" / FILE)) == 2


def steps_made(folder: Path) -> int:
    trace = folder / "trace"
    return len(trace.read_text(encoding="utf-8").splitlines()) if trace.exists() else 0


def cells_of(bench: int) -> list[psutil.Process]:
    """The processes of a bench's cells; none where it has just ended."""
    try:
        return psutil.Process(bench).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_at_random(folder: Path, kills: int, seed: int) -> int:
    """Kill the bench, every other time its cells too, then let it finish; how many kills hit."""
    rng, hit = random.Random(seed), 0
    given = ("--workers", "2", "--extend", str(folder / "witness.py"))
    for turn in range(kills):
        process = bench(folder / "tiny.yaml", folder / "out", *given)
        started = time.monotonic()
        if turn % 4 == 0:  # wherever it is by then
            time.sleep(rng.uniform(0, 5))
        else:  # in the midst of a cell
            wanted = steps_made(folder) + rng.randint(1, 5)
            while steps_made(folder) < wanted and process.poll() is None:
                time.sleep(0.01)
        cells = cells_of(process.pid) if turn % 2 else []
        hit += process.poll() is None
        process.kill()
        for one in cells:
            if one.is_running():
                one.kill()
        process.communicate()
        (folder / "out").mkdir(exist_ok=True)
        read_records(folder / "out" / FILE)  # raises where a line is torn
        print(f"kill {turn}: after {time.monotonic() - started:.1f} s,", end=" ")
        print(f"{len(read_records(folder / 'out' / FILE))} cells recorded")
    code, _, err = whole(folder / "tiny.yaml", folder / "out", *given)
    assert code == 0, err
    return hit


def check_after_kills(folder: Path, kills: int, seed: int) -> None:
    build(folder, SUITE)
    witness = WITNESS.format(trace=str(folder / "trace"))
    (folder / "witness.py").write_text(witness, encoding="utf-8")
    hit = kill_at_random(folder, kills, seed)
    assert hit >= min(kills, CELLS) // 2  # a bench that has finished cannot be killed
    records = by_key(folder / "out")
    assert len(records) == CELLS
    # a kill costs two workers the steps since their last checkpoint, and no more
    assert steps_made(folder) <= CELLS * (STEPS + 1) + kills * 2 * 2
    whole_folder = folder / "whole"
    given = ("--extend", str(folder / "witness.py"))
    assert whole(folder / "tiny.yaml", whole_folder, *given)[0] == 0
    assert records == by_key(whole_folder)


def test_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    check_after_kills(tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    check_after_kills(tmp_path, kills=20, seed=1)


def test_lines_are_json(finished: Path) -> None:
    for line in (finished / "out" / FILE).read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["status"] == "finished"
