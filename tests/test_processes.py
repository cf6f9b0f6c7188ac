"""Several processes train one model: the same plans and weights as one process, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rgft import Config, Guide
from rgft.errors import EngagementError, InputError
from tiny import Batch, bert, bert_loss, tokens
from workers import launch

STEPS = 8
ROWS = 16  # of the global batch


def config(**changed: Any) -> Config:
    return Config(**{"policy": "top", "top": 0.4, "every": 2, "beta": 0.5} | changed)


def share(batch: Batch) -> Batch:
    """The rows of this process."""
    if not dist.is_initialized():
        return batch
    rank, size = dist.get_rank(), dist.get_world_size()
    return {key: value[rank::size].contiguous() for key, value in batch.items()}


def ddp(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **{"find_unused_parameters": True} | settings)


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(kind: str, settings: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Plans, map and weights of a short run."""
    model = bert()
    inner, trained = model, model
    if kind.startswith("ddp"):
        trained = ddp(model)
    elif kind == "fsdp2":
        trained = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guide = Guide(inner if kind == "ddp-inner" else trained, optimizer, config(**settings))
    plans = []
    for batch in tokens(steps, rows=ROWS):
        bert_loss(trained, share(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        plans.append(guide.plan.lr_scale)
    guide.close()
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    return {"plans": plans, "error": guide.error_map.values, "weights": weights}


def assert_like_one(found: dict[str, Any], one: dict[str, Any]) -> None:
    # multipliers of scaling policies are functions of scores in float32
    torch.testing.assert_close(
        torch.tensor(found["plans"]), torch.tensor(one["plans"]), rtol=1e-4, atol=1e-5
    )
    trained = [[scale > 0 for scale in plan] for plan in found["plans"]]
    assert trained == [[scale > 0 for scale in plan] for plan in one["plans"]]
    torch.testing.assert_close(found["error"], one["error"], rtol=1e-4, atol=1e-6)
    assert found["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


CASES = {
    "norm": {},
    "infinity": {"p": float("inf"), "policy": "normalized-max", "top": 0.5},
    "relative": {"signal": "relative", "granularity": "block"},
    "heads": {"granularity": "head", "signal": "taylor"},
    "decrease": {"signal": "decrease", "policy": "normalized-sum", "top": 0.5},
}


def all_cases(kind: str) -> dict[str, Any]:
    return {name: train(kind, settings) for name, settings in CASES.items()}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["ddp", "ddp-inner", "fsdp2"])
def test_many_processes_do_what_one_does(kind: str, count: int, tmp_path: Path) -> None:
    ones = all_cases("one")
    assert len(set(ones["norm"]["plans"])) > 1  # something was decided
    found = launch(count, all_cases, tmp_path, kind)
    for result in found:
        for name, one in ones.items():
            assert result[name]["plans"] == found[0][name]["plans"]  # to the last bit
            assert_like_one(result[name], one)
