"""Tensors to fewer bytes and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgft.errors import InputError

FORMATS = ("float32", "bfloat16", "int8")
LEVELS = 127  # of int8 on each side of 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor on the host as it is kept.

    Attributes:
        values: Its elements, contiguous.
        scale: For int8, what each row (last dimension) is multiplied by; else None.
        dtype: The type that decoding restores.
    """

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in memory and in a file."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def encode(tensor: Tensor, kind: str) -> Encoded:
    r"""Keep `tensor` in one of `FORMATS`; it is copied.

    "float32" is exact but for float64, "bfloat16" leaves 8 significant bits (a relative error of at
    most $2^{-9}$), and "int8" has one scale a row: $q = \mathrm{round}(127 x / \max_j |x_j|)$, off
    by at most $\max_j |x_j| / 254$. Types that are no larger than the format are kept as they are.

    Raises:
        InputError: The tensor is not of a floating-point type.

    >>> decode(encode(torch.tensor([[0.5, -2.0], [0.0, 0.0]]), "int8")).round(decimals=1).tolist()
    [[0.5, -2.0], [0.0, 0.0]]
    """
    if not tensor.is_floating_point():
        raise InputError(
            f"activations are {tensor.dtype}; only floating-point ones can be kept: "
            "leave this model without a prefix cache"
        )
    values = tensor.detach().cpu()
    if kind == "int8":
        return _rows(values)
    target = torch.float32 if kind == "float32" else torch.bfloat16
    if values.element_size() <= target.itemsize:
        target = values.dtype
    kept = values.to(target, copy=True, memory_format=torch.contiguous_format)
    return Encoded(kept, None, tensor.dtype)


def decode(encoded: Encoded) -> Tensor:
    """The tensor again, a new one on the host."""
    if encoded.scale is None:
        return encoded.values.to(encoded.dtype, copy=True)
    return (encoded.values * encoded.scale).to(encoded.dtype)


def to_bytes(encoded: Encoded) -> bytes:
    """Values, then scales."""
    parts = [encoded.values] if encoded.scale is None else [encoded.values, encoded.scale]
    return b"".join(p.reshape(-1).view(torch.uint8).numpy().tobytes() for p in parts)


def from_bytes(
    data: bytearray, shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> Encoded | None:
    """What `to_bytes` made, or None if the size does not fit."""
    kept = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[kind]
    if kind != "int8" and dtype.itemsize <= kept.itemsize:
        kept = dtype
    values = torch.empty(shape, dtype=kept)
    rows = (*shape[:-1], 1) if shape else ()
    scale = torch.empty(rows) if kind == "int8" else None
    if len(data) != values.nbytes + (0 if scale is None else scale.nbytes):
        return None
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    values = raw[: values.nbytes].view(kept).reshape(shape)
    if scale is not None:
        # a copy, as scales need not start at a multiple of their size
        scale = raw[values.nbytes :].clone().view(torch.float32).reshape(rows)
    return Encoded(values, scale, dtype)


def _rows(values: Tensor) -> Encoded:
    """Symmetric int8; a row that is not finite becomes not-a-number."""
    exact = values.float()
    if not exact.numel():
        scale = torch.empty((*exact.shape[:-1], 1))
    else:
        scale = exact.abs().amax(-1, keepdim=True) / LEVELS
    divisor = torch.where(scale == 0, 1.0, scale)
    finite = scale.isfinite()
    quotient = torch.where(finite, exact / divisor, 0.0).round().clamp(-LEVELS, LEVELS)
    return Encoded(quotient.to(torch.int8), torch.where(finite, scale, torch.nan), values.dtype)
