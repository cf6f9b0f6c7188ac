"""Optimizers by name, with and without learning rates per group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import prodigyopt
import schedulefree
import torch
import transformers

Make = Callable[[Any], torch.optim.Optimizer]

LR = 0.01


def adafactor(params: Any, **settings: Any) -> torch.optim.Optimizer:
    given = {"scale_parameter": False, "relative_step": False, "lr": LR} | settings
    return transformers.Adafactor(params, **given)


def bitsandbytes_8bit(params: Any) -> torch.optim.Optimizer:
    import bitsandbytes  # noqa: PLC0415 - optional

    return bitsandbytes.optim.AdamW8bit(params, LR, min_8bit_size=16, weight_decay=0.1)


def torchao_8bit(params: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit  # noqa: PLC0415 - optional

    return AdamW8bit(params, LR, block_size=16, weight_decay=0.1)


def schedule_free(kind: str, params: Any) -> torch.optim.Optimizer:
    optimizer = getattr(schedulefree, kind)(params, lr=LR, weight_decay=0.1)
    optimizer.train()
    return optimizer


OWN_STATE: dict[str, Make] = {  # state per parameter: virtual groups
    "adamw-loop": lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(LR), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, LR, momentum=0.5, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, LR, weight_decay=0.1),
    "adafactor-transformers": adafactor,
    "muon": lambda p: torch.optim.Muon(p, LR, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, LR, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, LR),
    "adagrad": lambda p: torch.optim.Adagrad(p, LR),
    "adadelta": lambda p: torch.optim.Adadelta(p, LR),
    "asgd": lambda p: torch.optim.ASGD(p, LR),
    "nadam": lambda p: torch.optim.NAdam(p, LR),
    "radam": lambda p: torch.optim.RAdam(p, LR),
    "bitsandbytes-8bit": bitsandbytes_8bit,
    "torchao-8bit": torchao_8bit,
}
GROUP_STATE: dict[str, Make] = {  # state per group: real groups
    "schedule-free-adamw": partial(schedule_free, "AdamWScheduleFree"),
    "schedule-free-radam": partial(schedule_free, "RAdamScheduleFree"),
    "schedule-free-sgd": partial(schedule_free, "SGDScheduleFree"),
}
ONE_RATE: dict[str, Make] = {  # frozen or not, and nothing else
    "prodigy": lambda p: prodigyopt.Prodigy(p, weight_decay=0.1, decouple=False),
    "rprop": lambda p: torch.optim.Rprop(p, LR),
}
NEEDS = {"bitsandbytes-8bit": "bitsandbytes", "torchao-8bit": "torchao"}
