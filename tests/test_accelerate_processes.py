"""A loop of Accelerate in several processes: plans and weights of one, resumed or not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from loops import CLIP, optimizer_of, sharded_as_on_gpus
from rgft import Guide
from test_processes import ROWS, STEPS, assert_like_one, assert_second_half, config, whole
from tiny import bert, tokens
from workers import launch

PARTS, HALF = 2, STEPS // 2 + 1  # batches of a step; steps of the first half, between two decisions
ENGINES = ("ddp", "fsdp2")


def accelerator_of(engine: str) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    given: dict[str, Any] = {}
    if engine == "fsdp2":
        sharded_as_on_gpus()
        given["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
        )
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        cpu=True, gradient_accumulation_steps=PARTS, kwargs_handlers=[unused], **given
    )


def train(engine: str, folder: Path, part: str) -> dict[str, Any]:
    """A whole run, which leaves a state in the middle, or its second half."""
    accelerator = accelerator_of(engine)
    model = bert()
    (samples,) = tokens(1, rows=STEPS * PARTS * ROWS)
    rows = [{k: v[i] for k, v in samples.items()} for i in range(STEPS * PARTS * ROWS)]
    data = DataLoader(rows, batch_size=ROWS // accelerator.num_processes, shuffle=False)
    model, optimizer, data = accelerator.prepare(model, optimizer_of(model), data)
    inner = accelerator.unwrap_model(model)
    sharded = isinstance(next(inner.parameters()), DTensor)
    assert sharded == (engine == "fsdp2")
    guide = Guide(inner, optimizer, config())
    accelerator.register_for_checkpointing(guide)
    if part == "second":
        accelerator.load_state(str(folder / engine))
        assert guide.step == HALF
        data = accelerator.skip_first_batches(data, HALF * PARTS)
    plans = []
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            plans.append(guide.plan.lr_scale)
            if part == "whole" and guide.step == HALF:
                accelerator.save_state(str(folder / engine))
    guide.close()
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    return {"plans": plans, "error": guide.error_map.values, "weights": weights}


def everything(folder: Path) -> dict[str, list[dict[str, Any]]]:
    warnings.simplefilter("ignore")
    return {e: [train(e, folder, part) for part in ("whole", "second")] for e in ENGINES}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    """What each of two processes does."""
    folder = tmp_path_factory.mktemp("two")
    return launch(2, everything, folder / "work", folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_do_what_one_does(engine: str, two: Any, tmp_path: Path) -> None:
    one = train("one", tmp_path, "whole")
    assert len(set(one["plans"])) > 1
    for found in two:
        assert_like_one(found[engine][0], one)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_run(engine: str, two: Any) -> None:
    for found in two:
        full, second = found[engine]
        assert_second_half(second, full, HALF)
