"""The one place where values go from the device to the host (each call waits for the device)."""

from __future__ import annotations

from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy of `tensor` in host memory. Costs one synchronisation with the device."""
    return tensor.detach().to("cpu", copy=True)
