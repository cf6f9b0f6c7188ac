"""What PyTorch's own counter sees a step cost: the measure that predictions are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    del args, kwargs
    return sdpa_backward_flop_count(grad, query, key, value)


def _added_product(total: Any, left: Any, right: Any, **kwargs: Any) -> int:
    del total, kwargs
    (rows, inner), (_, columns) = left, right
    return int(2 * rows * inner * columns)


# The counter does not know the fused attention of CPUs, nor products added up in place.
ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _added_product,
}


def result(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(loss, Tensor):
        return loss
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.sum()


def counted_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """FLOPs of a forward pass and of the backward pass after it; gradients are left behind."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as forward:
        loss = result(model(**batch))
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as backward:
        if loss.requires_grad:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()
