"""DeepSpeed engines on CPUs, for real: scores and rates as in a plain loop; no freezing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rgft
from rgft import Config, Guide, InputError, Policy
from tiny import mlp, mlp_batches, squared_error, values
from workers import launch

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
STEPS = 6
CONFIG = Config(policy="normalized-max", every=2)
ENDS = tuple[tuple[float, ...], Tensor, dict[str, Tensor], int]


def engine_of(stage: int, parts: int = 1, *, split: bool = True, **settings: Any) -> Any:
    import deepspeed  # noqa: PLC0415 - not in our environment

    deepspeed.ops.__compatible_ops__.clear()  # else it compiles one before it begins
    model = mlp(torch.float32)
    optimizer = optimizer_of(model)
    if split:
        rgft.split_groups(optimizer, model)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": parts,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config | settings,
        dist_init_required=False,
    )
    return engine


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def data(rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """This process's rows."""
    size = 8 // count
    rows = slice(rank * size, (rank + 1) * size)
    return [(x[rows], y[rows]) for x, y in mlp_batches(STEPS, torch.float32)]


def guided(stage: int, parts: int = 1, folder: Path | None = None) -> ENDS:
    """With a folder: saved after three steps, and gone on with in another engine."""
    from rgft.integrations.deepspeed import GuidedEngine  # noqa: PLC0415 - after the skip

    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = engine_of(stage, parts)
    ours = GuidedEngine(engine, CONFIG)
    for step, (inputs, targets) in enumerate(data(rank, count)):
        if folder is not None and step == 3:
            engine.save_checkpoint(str(folder), client_state={"rgft": ours.guide.state_dict()})
            ours.guide.close()
            engine = engine_of(stage, parts)
            ours = GuidedEngine(engine, CONFIG)
            _, state = engine.load_checkpoint(str(folder))
            ours.guide.load_state_dict(state["rgft"])
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.01 * 0.9**step
        for piece in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            engine.backward(squared_error(engine, piece))
            ours.step()
        assert [g["lr"] for g in engine.optimizer.param_groups] == [0.01 * 0.9**step] * 3
    ours.guide.close()
    guide = ours.guide
    return guide.plan.lr_scale, guide.error_map.values, values(engine.module), guide.step


def alone() -> ENDS:
    """A plain loop in one process."""
    model = mlp(torch.float32)
    optimizer = optimizer_of(model)
    guide = Guide(model, optimizer, CONFIG)
    for step, batch in enumerate(mlp_batches(STEPS, torch.float32)):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.9**step
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()
    guide.close()
    return guide.plan.lr_scale, guide.error_map.values, values(model), guide.step


def close(found: ENDS, wanted: ENDS) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert max(found[0]) == 2
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-7)
    for name, value in wanted[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=0, atol=1e-5)
    assert found[3] == wanted[3] == STEPS


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_scores_rates_and_weights_are_those_of_a_plain_loop(stage: int, tmp_path: Path) -> None:
    (found,) = launch(1, guided, tmp_path, stage)
    close(found, alone())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes_do_what_one_does(stage: int, tmp_path: Path) -> None:
    for found in launch(2, guided, tmp_path, stage):
        close(found, alone())


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    (found,) = launch(1, guided, tmp_path, 1, 2)
    close(found, alone())


def test_it_goes_on_from_the_engines_checkpoint(tmp_path: Path) -> None:
    (found,) = launch(1, guided, tmp_path / "run", 1, 1, tmp_path / "saved")
    close(found, alone())


def refusals() -> dict[str, str]:
    from rgft.integrations.deepspeed import GuidedEngine  # noqa: PLC0415 - after the skip

    def halving(situation: Any) -> Tensor:
        return torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)

    tried = {
        "freezing": lambda: GuidedEngine(engine_of(1), Config(policy="top", top=0.5)),
        "prefix": lambda: GuidedEngine(engine_of(1), Config(frozen_below=1)),
        "own": lambda: one_step(GuidedEngine(engine_of(1), Config(policy=Policy(halving, False)))),
        "one group": lambda: one_step(
            GuidedEngine(engine_of(1, split=False), Config(policy="normalized-max", every=1)), 3
        ),
        "scheduler": lambda: GuidedEngine(
            engine_of(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3}})
        ),
    }
    tried["stage 3"] = lambda: GuidedEngine(engine_of(3))
    tried["bf16"] = lambda: GuidedEngine(engine_of(1, bf16={"enabled": True}))
    found = {}
    for name, attempt in tried.items():
        try:
            attempt()
        except InputError as error:
            found[name] = str(error)
    return found


def one_step(ours: Any, count: int = 1) -> None:
    for batch in mlp_batches(count, torch.float32):
        ours._engine.backward(squared_error(ours._engine, batch))
        ours.step()


def test_what_it_cannot_do_is_refused_with_the_reason(tmp_path: Path) -> None:
    (found,) = launch(1, refusals, tmp_path)
    for name in ("freezing", "prefix", "own"):
        assert "steps frozen parameters with zero gradients" in found[name]
    assert "call rgft.split_groups" in found["one group"]
    assert "allowed: 0, 1 and 2" in found["stage 3"]
    assert "bf16 are not supported" in found["bf16"]
    assert "keep the scheduler to yourself" in found["scheduler"]
