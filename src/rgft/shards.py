"""The part of a tensor that this process holds, where parameters are sharded (FSDP2: DTensor)."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part that is here, as a view; a tensor that is not sharded, as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # importing it takes a second; where nobody has, there is none
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def counts_here(tensor: Tensor, *, first: bool) -> bool:
    """Whether this process is the one among those with the same part that counts it.

    Args:
        tensor: A parameter.
        first: Whether this is process 0, which counts what all have whole.
    """
    if not is_sharded(tensor):
        return first
    mesh, where = _mesh(tensor), _mesh(tensor).get_coordinate()
    assert where is not None and mesh.ndim == len(where)
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return all(p.is_shard() or at == 0 for p, at in zip(placements, where, strict=True))


def extent(tensor: Tensor, dim: int) -> tuple[int, int]:
    """Where along a dimension the part that is here begins and ends, in the whole tensor."""
    if not is_sharded(tensor):
        return 0, tensor.shape[dim]
    from torch.distributed.tensor._utils import (  # noqa: PLC0415 - slow to import
        compute_local_shape_and_global_offset,
    )

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, _mesh(tensor), placements)
    return offset[dim], offset[dim] + shape[dim]


def _mesh(tensor: Tensor) -> Any:
    return tensor.device_mesh  # type: ignore[attr-defined]
