"""The Trainer's callback in several processes: the same plans and weights as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from rgft import Config
from rgft.errors import InputError
from rgft.execution.stored_samples import Storage
from rgft.integrations.transformers import RGFTCallback
from tiny import bert, hooks, tokens
from workers import launch

ROWS = 16
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
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"plans": callback.seen, "weights": weights}


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


def test_the_trainer_in_two_processes_does_what_it_does_in_one(tmp_path: Path) -> None:
    one = train(tmp_path, 1)
    assert len(set(one["plans"])) > 1
    for found in launch(2, train, tmp_path / "two", tmp_path, 2):
        torch.testing.assert_close(torch.tensor(found["plans"]), torch.tensor(one["plans"]))
        for name, weight in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


def test_what_the_trainer_cannot_do_in_two_processes_is_refused(tmp_path: Path) -> None:
    for found in launch(2, refusals, tmp_path / "two", tmp_path):
        assert found["prefix_cache"].startswith("0 prefix_cache works in one process")
        assert "ddp_find_unused_parameters=True" in found["checkpointing"]
