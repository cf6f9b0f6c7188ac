"""The residual ledger under the Trainer and under Lightning is that of a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import loops
from loops import CLIP, CONFIG, RATE, InOrder, Module, Resumable, _Stop, linear, optimizer_of
from rgft import Config, Guide, InputError
from rgft.execution.stored_samples import Storage
from rgft.integrations.lightning import RGFTCallback as LightningCallback
from rgft.integrations.loss_watch import residual_kind
from rgft.integrations.transformers import RGFTCallback
from tiny import bert, bert_with_lora, hooks, tokens
from workers import launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]
SAMPLES, BATCH, EPOCHS = 12, 4, 4
STEPS = EPOCHS * SAMPLES // BATCH
BETA = 0.5  # of a ledger that nothing is said about


def rows() -> list[dict[str, Any]]:
    batches = tokens(SAMPLES // BATCH, BATCH)
    flat = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(BATCH)]
    return [{**row, "sample_ids": i} for i, row in enumerate(flat)]


def expected() -> pd.DataFrame:
    """By a plain loop, and the formula written out for one sample after the other."""
    model = bert()
    optimizer = optimizer_of(model)
    guide = Guide(model, optimizer, CONFIG)
    scheduler = LambdaLR(optimizer, linear)
    residual: dict[int, float] = {}
    correct, forgotten, before = [0] * SAMPLES, [0] * SAMPLES, [False] * SAMPLES
    for _ in range(EPOCHS):
        for batch in DataLoader(rows(), batch_size=BATCH):
            ids = batch.pop("sample_ids").tolist()
            output = model(**batch)
            losses = F.cross_entropy(output.logits, batch["labels"], reduction="none")
            right = (output.logits.argmax(1) == batch["labels"]).tolist()
            for i, loss, was_right in zip(ids, losses.tolist(), right, strict=True):
                smoothed = BETA * residual.get(i, loss) + (1 - BETA) * loss
                residual[i] = smoothed
                correct[i] += was_right
                forgotten[i] += before[i] and not was_right
                before[i] = was_right
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    guide.close()
    columns = {"residual": [residual[i] for i in range(SAMPLES)], "correct": correct}
    return pd.DataFrame({**columns, "forgotten": forgotten, "visits": EPOCHS})


def hugging_face(
    folder: Path,
    callback: RGFTCallback,
    *,
    stop: int | None = None,
    resume: bool = False,
    data: Any = None,
    make: Callable[[], nn.Module] = bert,
    **changed: Any,
) -> None:
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "save_steps": 5,
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    model = make()
    optimizer = optimizer_of(model)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(str(folder / "out"), **given | changed),
        train_dataset=rows() if data is None else data,
        callbacks=[callback, *([] if stop is None else [_Stop(stop)])],
        optimizers=(optimizer, LambdaLR(optimizer, linear)),
    )
    trainer.train(resume_from_checkpoint=resume)


def lightning_loop(
    folder: Path,
    callback: LightningCallback,
    *,
    stop: int | None = None,
    resume: bool = False,
    data: Any = None,
    make: Callable[[], nn.Module] = bert,
) -> None:
    keep = ModelCheckpoint(str(folder), filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=stop or STEPS,
        max_epochs=None,
        gradient_clip_val=CLIP,
        callbacks=[keep, callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = Resumable(rows() if data is None else data, batch_size=BATCH, shuffle=False)
    path = str(folder / "step=5.ckpt") if resume else None
    trainer.fit(Module(make()), loader, ckpt_path=path)


LOOPS = {"trainer": (hugging_face, RGFTCallback), "lightning": (lightning_loop, LightningCallback)}


def table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


@pytest.mark.parametrize("name", LOOPS)
def test_it_is_that_of_a_loop_of_ones_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "RATE", 0.03)  # so that something is learned, and forgotten
    loop, callback = LOOPS[name]
    loop(tmp_path, callback(CONFIG, residuals=tmp_path / "residuals.parquet"))
    ours, theirs = table(tmp_path / "residuals.parquet"), expected()
    assert theirs["forgotten"].sum() > 0
    for column in theirs:
        found = ours[column].to_numpy("float64")
        assert found == pytest.approx(theirs[column].to_numpy(), rel=1e-4), column


@pytest.mark.parametrize("name", LOOPS)
def test_it_resumes_exactly(name: str, tmp_path: Path) -> None:
    loop, callback = LOOPS[name]
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    loop(tmp_path / "whole", callback(CONFIG, residuals=tmp_path / "whole.parquet"))
    loop(tmp_path / "parts", callback(CONFIG, residuals=tmp_path / "cut.parquet"), stop=5)
    loop(tmp_path / "parts", callback(CONFIG, residuals=tmp_path / "parts.parquet"), resume=True)
    pd.testing.assert_frame_equal(
        table(tmp_path / "parts.parquet"), table(tmp_path / "whole.parquet"), check_exact=True
    )
    assert table(tmp_path / "cut.parquet")["visits"].sum() == 5 * BATCH


@pytest.mark.parametrize("name", LOOPS)
def test_a_checkpoint_without_it_begins_it_anew(name: str, tmp_path: Path) -> None:
    loop, callback = LOOPS[name]
    loop(tmp_path, callback(CONFIG), stop=5)
    with pytest.warns(RuntimeWarning, match="step 5 was written without residuals"):
        loop(tmp_path, callback(CONFIG, residuals=tmp_path / "r.parquet"), resume=True)
    assert table(tmp_path / "r.parquet")["visits"].sum() == (STEPS - 5) * BATCH


@pytest.mark.parametrize("name", LOOPS)
def test_a_prefix_cache_leaves_it_as_it_is(name: str, tmp_path: Path) -> None:
    loop, callback = LOOPS[name]
    config = Config(policy="normalized-max", every=2, frozen_below=2)
    caches = {"without": None, "with": Storage()}
    for part, cache in caches.items():
        (tmp_path / part).mkdir()
        path = tmp_path / f"{part}.parquet"
        loop(tmp_path / part, callback(config, prefix_cache=cache, residuals=path))
    ours, theirs = (table(tmp_path / f"{part}.parquet") for part in ("with", "without"))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-5)
    assert (ours["visits"] == EPOCHS).all()


def test_lora(tmp_path: Path) -> None:
    callback = RGFTCallback(CONFIG, residuals=tmp_path / "r.parquet")
    hugging_face(tmp_path, callback, make=bert_with_lora)
    assert (table(tmp_path / "r.parquet")["visits"] == EPOCHS).all()


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows())


UNNUMBERED = [{k: v for k, v in row.items() if k != "sample_ids"} for row in rows()]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(
    ("data", "message"),
    [(UNNUMBERED, "has no sample_ids; give each its position, 0 to 11"),
     (Endless(), "cannot be counted and looked up by position")],
)  # fmt: skip
def test_data_without_numbers_is_refused_at_the_start(
    name: str, data: Any, message: str, tmp_path: Path
) -> None:
    loop, callback = LOOPS[name]
    model = bert()
    before = hooks(model)
    asked = callback(CONFIG, budget=0.5, prefix_cache=Storage(), residuals=tmp_path / "r.parquet")
    with pytest.raises(InputError, match=message):
        loop(tmp_path, asked, data=data, make=lambda: model)
    assert hooks(model) == before


def test_a_trainer_that_would_keep_it_from_the_ids_is_refused(tmp_path: Path) -> None:
    callback = RGFTCallback(CONFIG, residuals=tmp_path / "r.parquet")
    with pytest.raises(InputError, match="remove_unused_columns=False"):
        hugging_face(tmp_path, callback, remove_unused_columns=True)
    with pytest.raises(InputError, match="there are no labels"):
        hugging_face(tmp_path, callback, label_smoothing_factor=0.1)


def test_a_loop_that_hands_no_ids_on_is_refused_after_one_step(tmp_path: Path) -> None:
    model, seen = bert(), []
    model.register_forward_pre_hook(lambda *given: seen.append(given))
    callback = RGFTCallback(CONFIG, residuals=tmp_path / "r.parquet")
    with pytest.raises(InputError, match="the model was called without"):
        hugging_face(tmp_path, callback, make=lambda: model, data=Numberless(rows()))
    assert len(seen) == 1


class Numberless(list[Any]):
    """Loses the numbers of all samples but the first that is looked at."""

    looked = False

    def __getitem__(self, position: Any) -> Any:
        row = super().__getitem__(position)
        if not self.looked:
            self.looked = True
            return row
        return {k: v for k, v in row.items() if k != "sample_ids"}


def test_kinds_of_losses() -> None:
    logits, classes = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 3}
    cases = {
        "classification": (bert(), logits, classes),
        "regression": (bert(num_labels=1), torch.zeros(2, 1), torch.zeros(2)),
        "multi-label": (nn.Linear(1, 1), logits, torch.zeros(2, 3)),
        "causal-lm": (GPT2LMHeadModel(GPT2Config(**shape)), logits, classes),
    }
    for kind, (model, given, labels) in cases.items():
        assert residual_kind(model, given, labels) == kind


def train_here(folder: Path) -> list[int]:
    callback = RGFTCallback(CONFIG, residuals=folder / "r.parquet")
    hugging_face(folder, callback, save_strategy="no", per_device_train_batch_size=BATCH // 2)
    assert callback.ledger is not None
    return callback.ledger.visits.tolist()


def test_in_two_processes_it_has_the_samples_of_both(tmp_path: Path) -> None:
    for visits in launch(2, train_here, tmp_path / "two", tmp_path):
        assert visits == [EPOCHS] * SAMPLES
    assert (table(tmp_path / "r.parquet")["visits"] == EPOCHS).all()
