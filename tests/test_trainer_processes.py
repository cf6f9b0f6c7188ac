"""The Trainer's callback in several processes: the same plans and weights as in one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from loops import sharded_as_on_gpus
from rgft import Config
from rgft.errors import InputError
from rgft.execution.stored_samples import Storage
from rgft.integrations.transformers import RGFTCallback
from test_processes import assert_like_one, assert_second_half, whole
from tiny import bert, hooks, tokens
from workers import launch

ROWS = 16
HALF = 5  # steps before the checkpoint that is resumed from, between two decisions
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["BertLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    },
}
SETTINGS = {"policy": "top", "top": 0.4, "every": 2, "beta": 0.5}


class Plans(RGFTCallback):
    """Remembers every plan."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.seen: list[tuple[float, ...]] = []

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        super().on_step_end(*given, **kwargs)
        assert self.guide is not None
        self.seen.append(self.guide.plan.lr_scale)


def train(folder: Path, processes: int, **changed: Any) -> dict[str, Any]:
    (samples,) = tokens(1, rows=8 * ROWS)
    rows = [{key: value[i] for key, value in samples.items()} for i in range(8 * ROWS)]
    model = changed.pop("model", None) or bert()
    callback = Plans(Config(**SETTINGS), **changed.pop("callback", {}))
    resumed = changed.pop("resumed", None)
    given = {
        "per_device_train_batch_size": ROWS // processes,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        # else the Trainer multiplies this model's loss by the number of processes
        "average_tokens_across_devices": False,
    }
    args = TrainingArguments(str(folder / "out"), **given | changed)
    if args.fsdp:
        sharded_as_on_gpus()
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resumed)
    assert callback.guide is not None
    assert isinstance(next(model.parameters()), DTensor) == bool(args.fsdp)
    weights = {name: whole(p) for name, p in model.named_parameters()}
    return {"plans": callback.seen, "error": callback.guide.error_map.values, "weights": weights}


def everything(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """A whole run and its second half, by engine."""
    warnings.simplefilter("ignore")
    found = {}
    for engine, given in ENGINES.items():
        saving = {**given, "save_strategy": "steps", "save_steps": HALF}
        full = train(folder / engine, 2, **saving)
        checkpoint = str(folder / engine / "out" / f"checkpoint-{HALF}")
        found[engine] = [full, train(folder / engine, 2, resumed=checkpoint, **given)]
    return found


def refusals(folder: Path) -> dict[str, str]:
    """What was said, the cache's with the number of hooks that it leaves on the model."""
    cases = {
        "prefix_cache": {"callback": {"prefix_cache": Storage()}},
        "checkpointing": {"gradient_checkpointing": True},
    }
    found = {}
    for name, changed in cases.items():
        model = bert()
        before = hooks(model)
        try:
            train(folder, 2, model=model, **changed)
        except InputError as error:
            left = hooks(model) - before if name == "prefix_cache" else 0
            found[name] = f"{left} {error}"
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    """What each of two processes does."""
    folder = tmp_path_factory.mktemp("two")
    return launch(2, everything, folder / "work", folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_trainer_in_two_processes_does_what_it_does_in_one(
    engine: str, two: Any, tmp_path: Path
) -> None:
    one = train(tmp_path, 1)
    assert len(set(one["plans"])) > 1
    for found in two:
        assert_like_one(found[engine][0], one)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_run(engine: str, two: Any) -> None:
    for found in two:
        full, second = found[engine]
        assert_second_half(second, full, HALF)


def test_what_the_trainer_cannot_do_in_two_processes_is_refused(tmp_path: Path) -> None:
    for found in launch(2, refusals, tmp_path / "two", tmp_path):
        assert found["prefix_cache"].startswith("0 prefix_cache works in one process")
        assert "ddp_find_unused_parameters=True" in found["checkpointing"]
