"""The same fine-tuning by every integration: a loop, Accelerate, the Trainer, Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from rgft import Budget, Config, FlopMeter, Guide, Spending
from rgft.integrations.lightning import RGFTCallback as LightningCallback
from rgft.integrations.transformers import RGFTCallback
from tiny import bert, tokens, values

STEPS = 12
RATE = 1e-3
CLIP = 0.5
SCALE = 2.0**10  # of the loss, in float16, at first
CONFIG = Config(policy="top", top=0.4, every=2, warmup=2)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves."""

    weights: dict[str, Tensor]
    scores: Tensor
    plans: Tensor
    steps: int


def outcome(model: nn.Module, guide: Guide | None) -> Outcome:
    assert guide is not None
    history = guide.error_map.history

    def column(name: str) -> Tensor:
        return torch.from_numpy(history.column(name))

    errors = column("error").nan_to_num(nan=-1.0)  # never scored so far: equal to itself
    return Outcome(values(model), errors, column("lr_scale"), guide.step)


def rows(accumulation: int = 1) -> list[dict[str, Tensor]]:
    """Samples; four of them are a batch."""
    batches = tokens(STEPS * accumulation)
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(4)]


def loader(data: Sequence[Any]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4, shuffle=False)


class Resumable(DataLoader[Any]):
    """Tells Lightning where it is, which else begins the epoch anew."""

    done = 0

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        while self.done < len(batches):
            self.done += 1
            yield batches[self.done - 1]
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE)


def grad_scaler(enabled: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=enabled)


def scaled_as_on_gpus(accelerator: Accelerator) -> None:
    """Accelerate ignores float16 on CPUs, which can do it as well; from here on it does not."""
    accelerator.scaler, accelerator.native_amp = grad_scaler(), True


def sharded_as_on_gpus() -> None:
    """Accelerate ignores FSDP on CPUs, which can do it as well; the next that is made does not."""
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def linear(step: int) -> float:
    return 1 - step / STEPS


def plain(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    budget: float | None = None,
    accumulation: int = 1,
    bf16: bool = False,
    fp16: bool = False,
    make: Callable[[], nn.Module] = bert,
) -> Outcome:
    """A loop of one's own."""
    model = make()
    optimizer = optimizer_of(model)
    spending, schedule = None, linear
    if budget is not None:
        spending = Spending(FlopMeter(model), Budget(share=budget), batches=STEPS * accumulation)
        schedule = spending.paced(linear, STEPS)
    guide = Guide(model, optimizer, CONFIG, spending=spending)
    scheduler = LambdaLR(optimizer, schedule)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "guide": guide}
    if resume:
        saved = torch.load(folder / "state.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    batches = list(loader(rows(accumulation)))
    scaler, half = grad_scaler(fp16), torch.float16 if fp16 else torch.bfloat16
    for step in range(guide.step, STEPS):
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            with torch.autocast("cpu", half, enabled=bf16 or fp16):
                loss = model(**batch).loss
            scaler.scale(loss / accumulation).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        if spending is not None:
            spending.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 == stop:
            torch.save(
                {name: part.state_dict() for name, part in parts.items()}, folder / "state.pt"
            )
            break
        if spending is not None and spending.finished:
            break
    guide.close()
    return outcome(model, guide)


def accelerate(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    budget: float | None = None,
    accumulation: int = 1,
    bf16: bool = False,
    fp16: bool = False,
    make: Callable[[], nn.Module] = bert,
) -> Outcome:
    """A loop of Accelerate's."""
    AcceleratorState._reset_state()  # the precision of the one before would be kept
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if bf16 else "fp16" if fp16 else "no",
        gradient_accumulation_steps=accumulation,
    )
    if fp16:
        scaled_as_on_gpus(accelerator)
    model = make()
    optimizer = optimizer_of(model)
    spending, schedule = None, linear
    if budget is not None:
        spending = Spending(FlopMeter(model), Budget(share=budget), batches=STEPS * accumulation)
        schedule = spending.paced(linear, STEPS)
    scheduler = LambdaLR(optimizer, schedule)
    model, optimizer, data, scheduler = accelerator.prepare(
        model, optimizer, loader(rows(accumulation)), scheduler
    )
    guide = Guide(accelerator.unwrap_model(model), optimizer, CONFIG, spending=spending)
    accelerator.register_for_checkpointing(guide)
    if resume:
        accelerator.load_state(str(folder / "state"))
        data = accelerator.skip_first_batches(data, guide.step * accumulation)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            if spending is not None and accelerator.sync_gradients:
                spending.step()
            scheduler.step()
            optimizer.zero_grad()
        if guide.step == stop:
            accelerator.save_state(str(folder / "state"))
            break
        if spending is not None and spending.finished:
            break
    guide.close()
    return outcome(accelerator.unwrap_model(model), guide)


def hugging_face(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    budget: float | None = None,
    accumulation: int = 1,
    guided: bool = True,
    make: Callable[[], nn.Module] = bert,
    **settings: Any,
) -> Outcome:
    """The Trainer, as far as `stop` of `STEPS`."""
    callback = RGFTCallback(CONFIG, budget=budget)
    trainer = trainer_of(folder, [callback] if guided else [], make(), accumulation, **settings)
    if stop is not None:
        trainer.add_callback(_Stop(stop))
    trainer.train(resume_from_checkpoint=resume)
    if not guided:
        return Outcome(values(trainer.model), torch.empty(0), torch.empty(0), 0)
    return outcome(trainer.model, callback.guide)


class InOrder(Trainer):  # type: ignore[misc]
    """Without shuffling, so that others can do the same."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)


def trainer_of(
    folder: Path, callbacks: list[Any], model: nn.Module, accumulation: int = 1, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": RATE,
            "weight_decay": 0.01,
            "max_grad_norm": CLIP,
            "save_strategy": "steps",
            "save_steps": 5,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings,
        }
    )
    optimizer = optimizer_of(model)
    scheduler = LambdaLR(optimizer, linear)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=rows(accumulation),
        callbacks=callbacks,
        optimizers=(optimizer, scheduler),
    )
    # else it leaves the division by the accumulated batches to BERT, which does not do it
    trainer.model_accepts_loss_kwargs = False
    if arguments.fp16:
        scaled_as_on_gpus(trainer.accelerator)
    return trainer


class _Stop(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, kwargs
        control.should_training_stop = state.global_step == self.step


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A network and how it is trained."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        del index
        loss: Tensor = self.network(**batch).loss
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = optimizer_of(self.network)
        scheduler = {"scheduler": LambdaLR(optimizer, linear), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def lightning_loop(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    budget: float | None = None,
    accumulation: int = 1,
    guided: bool = True,
    bf16: bool = False,
    fp16: bool = False,
    make: Callable[[], nn.Module] = bert,
) -> Outcome:
    """Lightning's Trainer."""
    callback = LightningCallback(CONFIG, budget=budget)
    keep = ModelCheckpoint(str(folder), filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=stop or STEPS,
        max_epochs=None,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=CLIP,
        precision="bf16-mixed" if bf16 else None,
        # given as a name Lightning makes bfloat16 of it on CPUs
        plugins=MixedPrecision("16-mixed", "cpu", grad_scaler()) if fp16 else None,
        callbacks=[keep, *([callback] if guided else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(make())
    path = str(folder / "step=5.ckpt") if resume else None
    data = Resumable(rows(accumulation), batch_size=4, shuffle=False)
    trainer.fit(module, data, ckpt_path=path)
    if not guided:
        return Outcome(values(module.network), torch.empty(0), torch.empty(0), 0)
    return outcome(module.network, callback.guide)


LOOPS: dict[str, Callable[..., Outcome]] = {
    "plain": plain,
    "accelerate": accelerate,
    "trainer": hugging_face,
    "lightning": lightning_loop,
}
