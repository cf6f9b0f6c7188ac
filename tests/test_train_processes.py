"""`rgft train` in several processes does what it does in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from launches import Launched
from runs import call, finish, record_of, start, warm_up

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
    return record_of(output)


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


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(case: str, given: list[str], tmp_path: Path) -> None:
    arguments = [*given, *CASES[case]]
    one(arguments, tmp_path / "one")
    record = many(arguments, tmp_path / "two", 2)
    assert record["hardware"]["processes"] == 2
    assert_equal(tmp_path / "two", tmp_path / "one")
