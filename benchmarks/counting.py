"""PyTorch's own counter of FLOPs around training: what our prices and meters are held against.

`torch.utils.flop_counter.FlopCounterMode` with three changes. It knows the fused attention of CPUs,
by PyTorch's own formulas. For the backward pass of a convolution, where its formula leaves groups
out, it takes one product for each gradient that is computed. And it skips what runs on the meta
device, where no number is computed: that is how a model is traced to be priced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn, ops
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import Trainer

Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    del args, kwargs
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    del kwargs
    transposed, mask = args[4], args[7]
    return int(conv_flop_count(x, weight, grad, transposed)) * sum(mask[:2])


FORMULAS: dict[Any, Callable[..., int]] = {
    ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    ops.aten.convolution_backward: _convolution_backward,
}


class Counter(FlopCounterMode):
    """Counts what runs in its `with` block, forward and backward, while not paused."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=FORMULAS)
        self._paused = False

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return int(self.get_total_flops())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in this block does not count."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def without_evaluation(self) -> Iterator[None]:
        """Count in this block, but not what a Trainer runs to evaluate or to predict."""
        loop = Trainer.evaluation_loop

        def uncounted(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            with self.paused():
                return loop(trainer, *args, **kwargs)

        with mock.patch.object(Trainer, "evaluation_loop", uncounted), self:
            yield

    def _count_flops(self, packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """Called by PyTorch after every operation."""
        traced = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(out))
        if self._paused or traced:
            return out
        return super()._count_flops(packet, out, args, kwargs)


def step_flops(model: nn.Module, batch: dict[str, Tensor], loss_of: Callable[..., Tensor]) -> int:
    """FLOPs of one forward and backward pass; gradients are dropped."""
    counter = Counter()
    with counter:
        loss = loss_of(model, batch)
        if loss.requires_grad:
            loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.total
