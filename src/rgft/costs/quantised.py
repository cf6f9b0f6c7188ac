"""Quantised layers as the dense ones that they compute, so that their work can be counted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import linear


class Dense(nn.Linear):
    """A product in whatever type it is given, as layers with packed weights do it."""

    def forward(self, values: Tensor) -> Tensor:
        """As `nn.Linear`, for values of any type."""
        bias = None if self.bias is None else self.bias.to(values.dtype)
        return linear(values, self.weight.to(values.dtype), bias)


def stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, Dense]]:
    """Each linear layer of `model` whose weight is packed into whole numbers, and a dense one.

    Packed weights have a shape of their own, are unpacked by kernels that the meta device lacks, or
    carry what unpacks them. On the meta device, without gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            bias = module.bias is not None
            dense = Dense(module.in_features, module.out_features, bias, device="meta")
            yield module, dense.requires_grad_(False)
