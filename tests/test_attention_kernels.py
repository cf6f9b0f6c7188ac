"""Which kernel computes attention, and that its cost is that of the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flops import counted_flops
from rgft import CostModel
from rgft.attention_kernels import SHORT, attention_kernels
from tiny import Batch, bert, tokens

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Seen(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func)
        return func(*args, **(kwargs or {}))


def uses_flash(batch: Batch) -> bool:
    with torch.autocast("cpu", torch.bfloat16):
        loss = bert()(**batch).loss
    with Seen() as seen:
        loss.backward()
    return FLASH in seen.operations


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it is about CPUs")
@pytest.mark.parametrize(
    ("precision", "positions", "flash"),
    [
        ("bfloat16", SHORT, False),
        ("bfloat16", SHORT + 1, True),
        ("float32", SHORT, True),
        ("bfloat16", None, True),
    ],
)
def test_flash_attention_is_left_out_where_it_takes_longer(
    precision: str, positions: int | None, flash: bool
) -> None:
    batch = tokens()[0]
    with attention_kernels(precision, positions):
        assert uses_flash(batch) == flash
    assert uses_flash(batch)


def test_costs_are_those_of_the_kernel() -> None:
    model, batch = bert().train(), tokens()[0]
    costs = CostModel(model)
    found = []
    for precision in ("float32", "bfloat16"):
        with attention_kernels(precision, SHORT), torch.autocast("cpu", torch.bfloat16):
            cost = costs.graph(**batch).cost(costs.names)
            assert (cost.forward, cost.backward) == counted_flops(model, batch)
        found.append(cost.backward)
    assert found[0] > found[1]  # flash attention computes the scores once more
