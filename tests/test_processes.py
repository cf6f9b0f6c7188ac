"""Several processes train one model: the same plans and weights as one process, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rgft import Budget, Config, FlopMeter, Guide, Policy, Situation, Spending
from rgft.errors import EngagementError, InputError
from rgft.processes import Processes
from tiny import Batch, bert, bert_loss, same_state, tokens
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
    elif kind == "hsdp":
        names = ("replicas", "parts")
        trained = sharded(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=names))
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


def assert_second_half(second: dict[str, Any], full: dict[str, Any], half: int) -> None:
    """What a resumed run did after `half` of the plans is, bit for bit, what the full run did."""
    assert second["plans"] == full["plans"][half:]
    assert same_state(second["weights"], full["weights"])
    assert torch.equal(second["error"], full["error"])


CASES = {
    "norm": {},
    "infinity": {"p": float("inf"), "policy": "normalized-max", "top": 0.5},
    "relative": {"signal": "relative", "granularity": "block"},
    "heads": {"granularity": "head", "signal": "taylor"},
    "decrease": {"signal": "decrease", "policy": "normalized-sum", "top": 0.5},
}


def runs(kind: str, names: list[str]) -> dict[str, Any]:
    return {name: train(kind, CASES[name]) for name in names}


@pytest.fixture(scope="module")
def ones() -> dict[str, Any]:
    """What one process does."""
    return runs("one", list(CASES))


MANY = [
    *(("ddp", 2, list(CASES)), ("fsdp2", 2, list(CASES))),
    *(("ddp-inner", 2, ["norm"]), ("ddp", 4, ["norm"]), ("fsdp2", 4, ["norm", "heads"])),
    ("hsdp", 4, ["norm"]),
]


@pytest.mark.parametrize(("kind", "count", "names"), MANY, ids=[f"{k}-{n}" for k, n, _ in MANY])
def test_many_processes_do_what_one_does(
    kind: str, count: int, names: list[str], ones: dict[str, Any], tmp_path: Path
) -> None:
    assert len(set(ones["norm"]["plans"])) > 1  # something was decided
    found = launch(count, runs, tmp_path, kind, names)
    for result in found:
        for name in names:
            assert result[name]["plans"] == found[0][name]["plans"]  # to the last bit
            assert_like_one(result[name], ones[name])


# -- what is refused, what is detected ---------------------------------------------------------


def message(action: Any) -> str:
    try:
        action()
    except (InputError, EngagementError) as error:
        return str(error)
    return ""


def frozen_when_wrapped() -> str:
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    wrapper = ddp(model)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    return message(lambda: Guide(wrapper, optimizer, config()))


def guide_before_wrapper() -> str:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    guide = Guide(model, optimizer, config(policy="suffix", top=0.4))
    wrapper = ddp(model)
    found = message(lambda: wrapper(**share(tokens(1, rows=ROWS)[0])))
    del guide
    return found


def without_unused() -> list[str]:
    found = []
    for settings in ({"find_unused_parameters": False}, {"static_graph": True}):
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters())
        wrapper = ddp(model, **settings)
        found.append(message(lambda w=wrapper, o=optimizer: Guide(w, o, config())))
        Guide(wrapper, optimizer, config(policy="normalized-max", top=0.5)).close()
    return found


def different_settings() -> str:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    return message(lambda: Guide(ddp(model), optimizer, config(seed=dist.get_rank())))


def not_reduced() -> str:
    """Each process steps one parameter by itself."""
    model = bert()
    trained = ddp(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guide = Guide(trained, optimizer, config(policy="normalized-max", top=0.5))

    def run() -> None:
        for batch in tokens(4, rows=ROWS):
            bert_loss(trained, share(batch)).backward()
            model.classifier.weight.grad.mul_(1 + dist.get_rank())
            optimizer.step()
            optimizer.zero_grad()

    found = message(run)
    del guide
    return found


def samples_sharded() -> str:
    model = sharded(bert())
    optimizer = torch.optim.AdamW(model.parameters())
    fisher = config(signal="fisher")
    return message(lambda: Guide(model, optimizer, fisher, probe=lambda n: ()))


def frozen_types() -> str:
    """Groups that are all frozen at their first forward pass, and train later."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(bert(), mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guide = Guide(model, optimizer, config(policy="gradual-unfreezing", top=0.5, total_steps=8))
    plans = set()
    for batch in tokens(8, rows=ROWS):
        bert_loss(model, share(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        plans.add(guide.plan.trained)
    guide.close()
    return str(len(plans))


def by_rank(situation: Situation) -> torch.Tensor:
    """Each process would freeze something else, and wait for gradients that the other has not."""
    scale = torch.ones_like(situation.error)
    scale[dist.get_rank()] = 0.0
    return scale


def wanted_apart() -> tuple[bool, ...]:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    policy = Policy(by_rank, uses_error=False, freezes=True)
    guide = Guide(ddp(model), optimizer, config(policy=policy, top=0.5))
    guide.close()
    return guide.plan.trained


def all_refusals() -> dict[str, Any]:
    works = (
        *(frozen_when_wrapped, guide_before_wrapper, without_unused, different_settings),
        *(not_reduced, samples_sharded, frozen_types, wanted_apart),
    )
    return {work.__name__: work() for work in works}


def test_what_would_diverge_or_hang_is_refused_or_detected(tmp_path: Path) -> None:
    for found in launch(2, all_refusals, tmp_path):
        assert "frozen when it is built is never reduced" in found["frozen_when_wrapped"]
        assert "frozen when it is built is never reduced" in found["guide_before_wrapper"]
        assert "Kwargs(find_unused_parameters=True)" in found["without_unused"][0]
        assert "static_graph=True" in found["without_unused"][1]
        assert "process 1 has another plan or settings" in found["different_settings"]
        assert "'classifier.weight' is not the same in all processes" in found["not_reduced"]
        assert "per-sample gradients" in found["samples_sharded"]
        assert int(found["frozen_types"]) > 1
        assert found["wanted_apart"] == (False, True, True, True, True, True)


# -- what is sent --------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes of floating-point values given to collectives that reduce, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and "reduce" in name:
            tensors = tree_leaves(args[1] if "scatter" in name else args[0])
            values = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
            self.bytes += sum(t.numel() * t.element_size() for t in values)
        return func(*args, **(kwargs or {}))


def bytes_sent(kind: str, frozen_below: int) -> int:
    """Bytes of gradients that the second step reduces."""
    model = bert()
    trained = ddp(model) if kind == "ddp" else sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guide = Guide(trained, optimizer, config(policy="uniform", top=0.5, frozen_below=frozen_below))
    for batch in tokens(2, rows=ROWS):
        loss = bert_loss(trained, share(batch))
        with Sent() as sent:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    guide.close()
    return sent.bytes


def all_sent(kind: str) -> list[int]:
    return [bytes_sent(kind, below) for below in (0, 1, 2, 3)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_of_what_is_frozen_are_not_sent(kind: str, tmp_path: Path) -> None:
    sent = launch(2, all_sent, tmp_path, kind)
    assert sent[0] == sent[1]
    layer = sum(p.numel() for p in bert().bert.encoder.layer[0].parameters()) * 4
    everything, no_embeddings, *fewer = sent[0]
    assert everything >= no_embeddings > fewer[0] > fewer[1] > 0
    if kind == "ddp":  # exactly what is frozen, not whole buckets
        assert everything == 4 * sum(p.numel() for p in bert().parameters())
        assert no_embeddings - fewer[0] == fewer[0] - fewer[1] == layer


# -- budgets ---------------------------------------------------------------------------------------


def budgeted(kind: str) -> dict[str, Any]:
    model = bert()
    meter = FlopMeter(model)
    trained = {"one": lambda m: m, "ddp": ddp, "fsdp2": sharded}[kind](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    spending = Spending(meter, Budget(share=0.5), batches=20)
    guide = Guide(
        trained, optimizer, config(policy="purchase", top=0.5, rate=0.6), spending=spending
    )
    plans = []
    for batch in tokens(20, rows=ROWS):
        bert_loss(trained, share(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        spending.step()
        plans.append(guide.plan.trained)
        if spending.finished:
            break
    guide.close()
    return {"plans": plans, "spent": spending.spent, "progress": spending.progress}


def counted() -> list[tuple[int, int, int]]:
    """Counts after what all do alike, before and after they share, and after a batch of each."""
    model = nn.Linear(4, 2)
    meter, batch = FlopMeter(model), torch.ones(3, 4)
    model(batch)
    found = [meter.totals]
    meter.join(Processes())
    meter.join(Processes())  # a guide that finds the processes by itself
    meter.settle()
    found.append(meter.totals)
    with meter.probing(alike=True):
        model(batch)
    meter.settle()
    found.append(meter.totals)
    model(batch)
    found.append(meter.totals)
    meter.settle()
    found.append(meter.totals)
    meter.load(found[2])
    meter.settle()
    return [tuple(counts) for counts in (*found, meter.totals)]


def test_a_meter_counts_once_what_all_do_alike(tmp_path: Path) -> None:
    step = 2 * 3 * 4 * 2 * 2  # forward and weight gradients; inputs need none
    for before, shared, probed, unsettled, settled, loaded in launch(2, counted, tmp_path):
        assert before == shared == (step, step, 1)
        assert probed == unsettled == loaded == (2 * step, step, 1)
        assert settled == (4 * step, 3 * step, 3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_budget_is_one_of_all_processes(kind: str, tmp_path: Path) -> None:
    one = budgeted("one")
    assert 0 < len(one["plans"]) < 20
    for found in launch(2, budgeted, tmp_path, kind):
        assert found == one
