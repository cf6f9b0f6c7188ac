"""Steps that are compiled, or captured in a graph: they are guided, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide, InputError, Policy, Situation
from tiny import fit, mlp, mlp_batches, squared_error, values

pytestmark = [  # dynamo imports what is deprecated
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
SCALES = ((0.5, 0.0, 2.0), (1.0, 0.25, 0.0), (0.0, 1.0, 1.0))
STEPS = 12  # more than the graphs that PyTorch makes of one function
RATES: dict[str, Callable[[], Any]] = {"number": lambda: 0.01, "tensor": lambda: torch.tensor(0.01)}


def turning(situation: Situation) -> Tensor:
    return torch.tensor(SCALES[situation.step // 2 % 3], dtype=torch.float64)


class Compiled:
    """An optimizer whose step is compiled."""

    def __init__(self, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        self.zero_grad = optimizer.zero_grad
        self.step = torch.compile(optimizer.step, backend="eager", **settings)


def guided(model: nn.Module, optimizer: torch.optim.Optimizer) -> Guide:
    policy = Policy(turning, False, freezes=True)
    return Guide(model, optimizer, Config(policy=policy, every=2, always_train=()))


@pytest.mark.parametrize("rate", RATES)
def test_it_is_the_step_that_is_not_compiled(rate: str) -> None:
    torch._dynamo.reset()
    models, plans = [], []
    for compiled in (True, False):
        model = mlp(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), RATES[rate](), weight_decay=0.1)
        guide = guided(model, optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        stepped: Any = Compiled(optimizer) if compiled else optimizer
        found = []
        for batch in mlp_batches(STEPS, torch.float32):
            list(fit(model, stepped, [batch], squared_error))
            scheduler.step()
            found.append(guide.plan.lr_scale)
        assert guide.step == STEPS
        guide.close()
        models.append(model)
        plans.append(found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert plans[0] == plans[1]
    assert len(set(plans[0])) == 3
    for name, value in values(models[1]).items():
        torch.testing.assert_close(values(models[0])[name], value, rtol=0, atol=5e-6)


def test_a_step_that_was_compiled_before_is_guided() -> None:
    torch._dynamo.reset()
    model = mlp(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    stepped: Any = Compiled(optimizer)
    batches = mlp_batches(8, torch.float32)
    list(fit(model, stepped, batches[:3], squared_error))
    guide = guided(model, optimizer)
    list(fit(model, stepped, batches[3:5], squared_error))
    before = values(model)
    assert guide.plan.lr_scale == SCALES[1]
    list(fit(model, stepped, batches[5:7], squared_error))
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias", "2.weight", "2.bias"}
    guide.close()
    list(fit(model, stepped, batches[7:], squared_error))
    assert not torch.equal(values(model)["4.weight"], before["4.weight"])


def test_one_graph_for_all_is_an_error() -> None:
    torch._dynamo.reset()
    model = mlp(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    guided(model, optimizer)
    stepped: Any = Compiled(optimizer, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        list(fit(model, stepped, mlp_batches(1, torch.float32), squared_error))


def test_capturing_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture needs a device: that there is one is pretended."""
    model = mlp(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    guided(model, optimizer)
    before = values(model)
    squared_error(model, mlp_batches(1, torch.float32)[0]).backward()
    with monkeypatch.context() as pretended:
        pretended.setattr(torch.cuda, "is_initialized", lambda: True)
        pretended.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(InputError, match="without the guide"):
            optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
