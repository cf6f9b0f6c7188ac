"""A training loop as timm's own script has it: its models, groups, schedule, clipping and average.

timm is not in our environment; a test that needs it is skipped without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIDE, CLASSES = 32, 4
VIT, RESNET = "vit_tiny_patch16_224", "resnet10t"  # with attention; with batch normalization
SMALL: dict[str, Any] = {"img_size": SIDE, "depth": 3, "embed_dim": 48, "num_heads": 3}
RATE, UPDATES, ROWS = 2e-3, 8, 8
Batch = tuple[Tensor, Tensor]


def timm() -> ModuleType:
    """The library, with what it imports on demand."""
    found: ModuleType = pytest.importorskip("timm")
    for part in ("loss", "optim", "scheduler", "utils"):
        import_module(f"timm.{part}")
    return found


def model_of(kind: str = VIT) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = SMALL if kind == VIT else {}
        return timm().create_model(kind, num_classes=CLASSES, **small).train()


def batches(count: int = UPDATES) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ROWS, 3, SIDE, SIDE, generator=random),
            torch.randint(CLASSES, (ROWS,), generator=random),
        )
        for _ in range(count)
    ]


@dataclass
class Loop:
    """What a loop has, by timm's own functions.

    Attributes:
        model: What trains.
        optimizer: Without weight decay for what has one dimension.
        scheduler: Warms up, then follows a cosine; it writes rates from the groups' `lr_scale`.
        average: Of the weights.
        parts: In how many pieces a batch comes.
        bf16: Whether products are computed in bfloat16.
        epoch: Batches after which samples come back, for which they are numbered; 0: they are not.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    average: Any
    parts: int = 1
    bf16: bool = False
    epoch: int = 0

    def updates(
        self, data: list[Batch], start: int = 0, spent: Callable[[], None] = lambda: None
    ) -> Iterator[int]:
        """One optimizer step a batch; yields how many there have been."""
        loss_of = timm().loss.LabelSmoothingCrossEntropy()
        for update, (images, labels) in enumerate(data, start):
            numbers = torch.arange(ROWS) + ROWS * (update % (self.epoch or 1))
            given = {"sample_ids": numbers} if self.epoch else {}
            pieces = zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True)
            for piece, wanted in pieces:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    loss = loss_of(self.model(piece, **given), wanted)
                (loss / self.parts).backward()
            timm().utils.dispatch_clip_grad(self.model.parameters(), 1.0, mode="norm")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update(self.model, step=update)
            spent()
            self.scheduler.step_update(update + 1)
            yield update + 1


def loop_of(
    model: nn.Module, groups: Any = None, *, parts: int = 1, bf16: bool = False, **changed: Any
) -> Loop:
    """timm makes the groups, unless they are given."""
    settings = {"opt": "adamw", "lr": RATE, "weight_decay": 0.05} | changed
    make = timm().optim.create_optimizer_v2
    optimizer = make(model if groups is None else groups, **settings)
    scheduler = timm().scheduler.CosineLRScheduler(
        optimizer, t_initial=UPDATES, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False
    )
    average = timm().utils.ModelEmaV3(model, decay=0.9)
    return Loop(model, optimizer, scheduler, average, parts, bf16)
