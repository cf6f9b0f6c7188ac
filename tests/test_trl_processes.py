"""TRL and sentence-transformers in several processes: the same plans and weights as in one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from test_processes import whole
from test_trainer_processes import ENGINES
from test_trl import pytestmark  # noqa: F401 - the warnings to ignore
from test_trl_features import NAMES, RATE, Plans, trainer_of
from tiny import same_state
from workers import launch

HALF = 3  # steps before the checkpoint that is resumed from


def train(name: str, folder: Path, processes: int, engine: str = "ddp", **how: Any) -> Any:
    """Plans and weights; resumed from the checkpoint of the run before, if that is asked for."""
    given: dict[str, Any] = dict(ENGINES[engine])
    if engine == "fsdp2":
        layer = "BertLayer" if name == "sentences" else "LlamaDecoderLayer"
        given["fsdp_config"] = given["fsdp_config"] | {"transformer_layer_cls_to_wrap": [layer]}
    callback = Plans()
    saved = {"save_strategy": "steps", "save_steps": HALF}
    rows = {"per_device_train_batch_size": 4 // processes}
    trainer = trainer_of(name, folder, callback, f"{name}-{engine}", **rows | saved | given)
    trainer.train(**how)
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(next(model.parameters()), DTensor) == (engine == "fsdp2")
    return {"plans": callback.seen, "weights": {n: whole(p) for n, p in model.named_parameters()}}


def everything(folder: Path) -> dict[str, Any]:
    """By name and engine."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in NAMES:
        for engine in ENGINES:
            found[name, engine] = train(name, folder, 2, engine)
        checkpoint = str(folder / f"{name}-ddp" / f"checkpoint-{HALF}")
        found[name, "resumed"] = train(name, folder, 2, resume_from_checkpoint=checkpoint)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes does."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("sft", "sentences"):  # the models that both read
        trainer_of(name, folder, TrainerCallback())
    return launch(2, everything, folder / "work", folder)


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process does, by name."""
    return {name: train(name, tmp_path_factory.mktemp("one"), 1) for name in NAMES}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does(name: str, engine: str, two: Any, ones: Any) -> None:
    one = ones[name]
    assert len(set(one["plans"])) > 1
    for found in two:
        assert found[name, engine]["plans"] == one["plans"]
        for weight, value in one["weights"].items():
            ours = found[name, engine]["weights"][weight]
            torch.testing.assert_close(ours, value, rtol=0, atol=RATE / 100)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_run(name: str, two: Any) -> None:
    for found in two:
        full, second = found[name, "ddp"], found[name, "resumed"]
        assert second["plans"] == full["plans"][HALF:]
        assert same_state(second["weights"], full["weights"])
