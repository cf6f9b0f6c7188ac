"""Engines that rebuild parameters or optimizers are refused, with the reason: the real ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from rgft import Guide, InputError
from tiny import mlp
from workers import launch

RATE = 1e-3
Pair = tuple[nn.Module, torch.optim.Optimizer]


def fsdp1() -> list[Pair]:
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - slow to import

    model = FullyShardedDataParallel(mlp(torch.float32), device_id=torch.device("cpu"))
    return [(model, torch.optim.AdamW(model.parameters(), RATE))]


def zero_redundancy() -> list[Pair]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415 - slow to import

    model = mlp(torch.float32)
    return [(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE))]


def deepspeed() -> list[Pair]:
    """Its engine, and what it makes of the optimizer, however they are given."""
    import deepspeed as engines  # noqa: PLC0415 - not in our environment

    engines.ops.__compatible_ops__.clear()  # else it compiles one before it begins
    pairs: list[Pair] = []
    for stage in (0, 1, 2):
        model = mlp(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, made, _, _ = engines.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        pairs += [(engine, made), (engine, optimizer)]
        if stage:
            pairs.append((model, made))
    return pairs


def answers(make: Callable[[], list[Pair]]) -> list[str]:
    found = []
    for model, optimizer in make():
        try:
            Guide(model, optimizer)
        except InputError as error:
            found.append(str(error))
        else:
            found.append(f"{type(model).__name__}, {type(optimizer).__name__}: not refused")
    return found


ENGINES = {
    fsdp1: "FSDP1) flattens parameters of several components into one",
    zero_redundancy: "steps with groups of its own on each process",
    deepspeed: "DeepSpeed flattens parameters into buffers of its own",
}


@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_it_is_refused(
    make: Callable[[], list[Pair]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(make.__name__) is None and make is deepspeed:
        pytest.skip("deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (found,) = launch(1, answers, tmp_path / "one", make)
    assert found
    assert all(ENGINES[make] in answer for answer in found), found
