"""What holds for every partition."""

from __future__ import annotations

import torch
from torch import nn

from rgft.components import Component


def check_partition(model: nn.Module, components: list[Component]) -> None:
    """Every element is in exactly one component; names are unique and depths ascend."""
    parameters = dict(model.named_parameters())
    seen = {name: torch.zeros(p.shape, dtype=torch.int8) for name, p in parameters.items()}
    for component in components:
        numel = 0
        for piece in component.slices:
            view = piece.of(seen[piece.parameter])
            view += 1
            numel += view.numel()
        assert numel == component.numel > 0
    for name, count in seen.items():
        assert (count == 1).all(), name
    assert sum(c.numel for c in components) == sum(p.numel() for p in model.parameters())
    assert len({c.name for c in components}) == len(components)
    assert [c.depth for c in components] == sorted(c.depth for c in components)
