"""`optim="schedule_free_adamw"`: the Trainer's own schedule-free optimizer, guided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn
from transformers import TrainingArguments

import rgft
from loops import InOrder, rows
from rgft import Config, InputError
from rgft.integrations.transformers import RGFTCallback
from tiny import bert, same_state, values

STEPS = 8
RATE = 1e-2
CONFIG = Config(policy="normalized-max", every=2)


class Split(InOrder):
    """As the documentation has it, and without shuffling."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            rgft.split_groups(optimizer, self.model)
        return optimizer


def trained(
    folder: Path, kind: type[InOrder] = Split, **how: Any
) -> tuple[nn.Module, RGFTCallback]:
    callback = RGFTCallback(CONFIG)
    arguments = TrainingArguments(
        str(folder),
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        learning_rate=RATE,
        weight_decay=0.1,
        max_grad_norm=0,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = kind(model=bert(), args=arguments, train_dataset=rows(), callbacks=[callback])
    trainer.train(**how)
    return trainer.model, callback


def by_hand() -> nn.Module:
    """A loop of one's own, with a group for what decays and one for what does not."""
    model = bert()
    kept = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    decayed = [p for p in model.parameters() if all(p is not one for one in kept)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = schedulefree.AdamWScheduleFree(groups, lr=RATE, weight_lr_power=2.0, r=0.0)
    rgft.split_groups(optimizer, model)
    guide = rgft.Guide(model, optimizer, CONFIG)
    optimizer.train()
    for batch in list(torch.utils.data.DataLoader(rows(), batch_size=4))[:STEPS]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    guide.close()
    return model


def test_it_is_the_loop_of_ones_own(tmp_path: Path) -> None:
    model, callback = trained(tmp_path)
    assert callback.guide is not None
    assert len(set(callback.guide.plan.lr_scale)) > 1
    theirs = values(by_hand())
    for name, value in values(model).items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_it_resumes_exactly(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path)
    again, callback = trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.guide is not None and callback.guide.step == STEPS
    assert same_state(values(whole), values(again))


def test_without_groups_of_their_own_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="split_groups"):
        trained(tmp_path, InOrder)
