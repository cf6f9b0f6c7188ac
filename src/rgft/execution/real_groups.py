"""Real parameter groups per component, for optimizers that keep state in their groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rgft.components import partition
from rgft.errors import InputError
from rgft.execution.step_hooks import plain_optimizer
from rgft.granularities import Granularity

State = dict[str, Any]


def split_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, granularity: Granularity = "layer"
) -> None:
    """Give each component groups of its own in `optimizer`.

    Optimizers such as schedule-free ones derive state of a group from its learning rate, so that
    components with different rates cannot share a group. A state saved without the split still
    loads: it is split as the groups were.

    Args:
        optimizer: Fresh: it has not stepped, and no scheduler was made for it.
        model: The model that it trains.
        granularity: That of the guide's `Config`.

    Raises:
        InputError: The optimizer is in use already.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> split_groups(optimizer, model)
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [2, 2]
    """
    optimizer = plain_optimizer(optimizer)
    groups = optimizer.param_groups
    stepped = any(optimizer.state.values())  # `train()` of schedule-free ones makes empty entries
    if stepped or any("initial_lr" in group for group in groups):
        raise InputError(
            "the optimizer has stepped or has a scheduler; call split_groups directly after making "
            "the optimizer"
        )
    named = dict(model.named_parameters())
    owners: dict[nn.Parameter, tuple[str, ...]] = {}
    for component in partition(model, granularity):
        for part in component.slices:
            parameter = named[part.parameter]
            owners[parameter] = (*owners.get(parameter, ()), component.name)
    split: list[State] = []
    origin: list[tuple[int, list[int]]] = []
    for index, group in enumerate(groups):
        positions: dict[tuple[str, ...], list[int]] = {}
        for position, parameter in enumerate(group["params"]):
            positions.setdefault(owners.get(parameter, ()), []).append(position)
        for held in positions.values():
            split.append({**group, "params": [group["params"][i] for i in held]})
            origin.append((index, held))
    sizes = [len(group["params"]) for group in groups]
    groups[:] = split

    def split_state(_: torch.optim.Optimizer, state: State) -> State | None:
        saved = state["param_groups"]
        if [len(group["params"]) for group in saved] != sizes:
            return None
        parts = [
            {**saved[index], "params": [saved[index]["params"][i] for i in held]}
            for index, held in origin
        ]
        return {**state, "param_groups": parts}

    optimizer.register_load_state_dict_pre_hook(split_state)
