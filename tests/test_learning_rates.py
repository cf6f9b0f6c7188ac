"""Virtual groups that are kept from step to step, against groups made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rgft import Config, Guide
from rgft.errors import InputError
from rgft.execution.learning_rates import VirtualGroups
from tiny import fit, mlp, mlp_batches, squared_error

Change = Callable[[torch.optim.Optimizer], None]


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": parameters[:3], "weight_decay": 0.1},
        {"params": parameters[3:], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.5)


def reverse_in_place(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def move_between_groups(optimizer: torch.optim.Optimizer) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def add_a_group(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.25})


def append_in_place(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["params"].append(nn.Parameter(torch.ones(3)))


def load_a_state(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.0625
    optimizer.load_state_dict(state)


def schedule(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0].update(lr=0.125, betas=(0.5, 0.9))
    del optimizer.param_groups[1]["maximize"]
    optimizer.param_groups[1]["name"] = "new"


def nothing(optimizer: torch.optim.Optimizer) -> None:
    del optimizer


CHANGES = (
    nothing,
    schedule,
    reverse_in_place,
    append_in_place,
    move_between_groups,
    add_a_group,
    load_a_state,
)


def others(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in {"lr", "params"}}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_to_the_real_groups_reach_the_virtual_ones(change: Change) -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = optimizer_of(parameters)
    scale = dict(zip(parameters, (0.0, 2.0, 0.5, 2.0, 2.0, 0.0), strict=True))
    groups = VirtualGroups()
    for _ in range(2):
        groups.enter(optimizer, scale)
        groups.leave(optimizer)
    change(optimizer)
    for _ in range(2):
        real = optimizer.param_groups
        before = [dict(group) for group in real]
        groups.enter(optimizer, scale)
        found = {p: group for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
        wanted = {p: group for group in real for p in group["params"] if scale.get(p, 1.0)}
        assert set(found) == set(wanted)
        for p, group in wanted.items():
            assert found[p]["lr"] == group["lr"] * scale.get(p, 1.0)
            assert others(found[p]) == others(group)
        groups.leave(optimizer)
        assert optimizer.param_groups is real
        assert real == before


def test_another_plan_divides_anew() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = optimizer_of(parameters)
    groups = VirtualGroups()
    for frozen in parameters:
        groups.enter(optimizer, {p: float(p is not frozen) for p in parameters})
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in parameters} - {id(frozen)}
        groups.leave(optimizer)


def test_a_tensor_that_is_changed_in_place_changes_once_a_step() -> None:
    """timm's LAMB counts its steps so."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = optimizer_of(parameters)
    groups = VirtualGroups()
    for step in range(3):
        groups.enter(optimizer, dict(zip(parameters, (0.0, 2.0, 0.5, 0.0, 0.0, 0.0), strict=True)))
        for group in optimizer.param_groups:
            group.setdefault("step", torch.tensor(0.0)).add_(1)
        groups.leave(optimizer)
        assert groups.keeps_state
        assert [float(group["step"]) for group in optimizer.param_groups] == [step + 1] * 2


def test_a_tensor_that_follows_the_learning_rate_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = optimizer_of(parameters)
    for group in optimizer.param_groups:
        group["total"] = torch.tensor(0.0)
    groups = VirtualGroups()
    groups.enter(optimizer, {parameters[0]: 2.0})
    for group in optimizer.param_groups:
        group["total"].add_(group["lr"])
    with pytest.raises(InputError, match="writes 'total' to its parameter groups"):
        groups.leave(optimizer)


def put_others_in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As Accelerate does for FSDP2: new parameters in the model, and in the groups for the old."""
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[parameter])
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]


def test_parameters_that_are_replaced_after_the_guide_is_made_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    Guide(model, optimizer, Config(policy="suffix", top=0.4, every=4, engagement="off"))
    put_others_in_place(model, optimizer)
    with pytest.raises(InputError, match="make the Guide after them") as caught:
        list(fit(model, optimizer, mlp_batches(1), squared_error))
    assert "\n" not in str(caught.value)
