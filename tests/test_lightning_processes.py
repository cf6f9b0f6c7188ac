"""Lightning's callback in several processes: plans, weights, budget and ledger are those of one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.data import DistributedSampler

from loops import Module, Resumable
from rgft import Config
from rgft.errors import InputError
from rgft.execution.stored_samples import Storage
from rgft.integrations.lightning import RGFTCallback
from test_integrations import pytestmark  # noqa: F401 - the warnings to ignore
from test_processes import sharded
from tiny import bert, hooks, same_state, tokens, values
from workers import launch

ROWS, STEPS = 16, 8
HALF = 5  # steps before the checkpoint that is resumed from, between two decisions
SETTINGS = {"policy": "top", "top": 0.4, "every": 2, "beta": 0.5}


class Sharded(Module):
    """As ModelParallelStrategy asks for it."""

    def configure_model(self) -> None:
        sharded(self.network)


class Plans(RGFTCallback):
    """Remembers every plan."""

    def __init__(self, **given: Any) -> None:
        super().__init__(Config(**SETTINGS), **given)
        self.seen: list[tuple[float, ...]] = []

    def on_train_batch_end(self, *given: Any) -> None:
        super().on_train_batch_end(*given)
        assert self.guide is not None
        self.seen.append(self.guide.plan.lr_scale)


def rows() -> list[dict[str, Any]]:
    (samples,) = tokens(1, rows=STEPS * ROWS)
    numbered = {**samples, "sample_ids": torch.arange(STEPS * ROWS)}
    return [{key: value[i] for key, value in numbered.items()} for i in range(STEPS * ROWS)]


def trainer_of(
    callback: RGFTCallback, processes: int, strategy: Any = None, folder: Path | None = None
) -> lightning.Trainer:
    if strategy is None and processes > 1:
        strategy = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=HALF, save_top_k=-1)
    return lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy or "auto",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[callback, *([keep] if folder else [])],
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(
    processes: int,
    model: nn.Module | None = None,
    strategy: Any = None,
    *,
    folder: Path | None = None,
    resumed: bool = False,
    **given: Any,
) -> dict[str, Any]:
    torch.manual_seed(0)
    kind = Sharded if isinstance(strategy, ModelParallelStrategy) else Module
    callback, module = Plans(**given), kind(model or bert())
    trainer = trainer_of(callback, processes, strategy, folder)
    data, part = rows(), None
    if processes > 1:  # Lightning's own would shuffle
        part = DistributedSampler(data, shuffle=False)
    loader = Resumable(data, batch_size=ROWS // processes, sampler=part)
    path = folder / f"step={HALF}.ckpt" if resumed and folder else None
    trainer.fit(module, loader, ckpt_path=path)
    spent = None if callback.spending is None else callback.spending.spent
    return {"plans": callback.seen, "weights": values(module.network), "spent": spent}


def everything(folder: Path, processes: int) -> list[dict[str, Any]]:
    """Without a budget and with one; both keep a ledger."""
    warnings.simplefilter("ignore")
    table = folder / f"{processes}.parquet"
    return [
        train(processes, residuals=table),
        train(processes, budget=0.5, residuals=folder / "budget.parquet"),
        train(processes, folder=folder / str(processes)),
        train(processes, folder=folder / str(processes), resumed=True),
    ]


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    ones = everything(tmp_path, 1)
    assert len(set(ones[0]["plans"])) > 1
    assert len(ones[1]["plans"]) < STEPS
    for found in launch(2, everything, tmp_path / "two", tmp_path, 2):
        assert found[3]["plans"] == found[2]["plans"][HALF:]
        assert same_state(found[3]["weights"], found[2]["weights"])
        for ours, one in zip(found, ones, strict=True):
            torch.testing.assert_close(torch.tensor(ours["plans"]), torch.tensor(one["plans"]))
            assert ours["spent"] == one["spent"]
            for name, weight in one["weights"].items():
                torch.testing.assert_close(ours["weights"][name], weight, rtol=0, atol=1e-5)
    ours, one = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in (2, 1))
    pd.testing.assert_frame_equal(ours, one, check_exact=False, rtol=1e-4)
    assert (ours["visits"] == 1).all()


def refusals() -> dict[str, tuple[str, int]]:
    """What was said, and how many hooks are left on the model."""
    warnings.simplefilter("ignore")
    cases: dict[str, dict[str, Any]] = {
        "cache": {"prefix_cache": Storage()},
        "sharded": {"strategy": ModelParallelStrategy(process_group_backend="gloo")},
        "unused": {"strategy": DDPStrategy(process_group_backend="gloo")},
        "apart": {"strategy": SingleDeviceStrategy("cpu")},
    }
    found = {}
    for name, given in cases.items():
        model = bert()
        before = hooks(model)
        try:
            train(1 if name == "apart" else 2, model, **given)
        except InputError as error:
            found[name] = str(error), hooks(model) - before
    return found


def test_what_it_cannot_do_in_two_processes_is_refused(tmp_path: Path) -> None:
    for found in launch(2, refusals, tmp_path / "two"):
        assert "prefix_cache works in one process" in found["cache"][0]
        assert "ddp_find_unused_parameters_true" in found["unused"][0]
        assert "ModelParallelStrategy" in found["sharded"][0]
        assert "SingleDeviceStrategy" in found["apart"][0]
        del found["sharded"]  # the hooks of FSDP2 itself
        assert {left for _, left in found.values()} == {0}
