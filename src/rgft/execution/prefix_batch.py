"""A batch seen as samples: their ids, their real positions, and what they consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rgft.activations import Key
from rgft.errors import InputError

MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
MASK = "attention_mask"
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd multipliers from the golden ratio and from MurmurHash3, as signed 64-bit numbers
SPREAD, MIX = -7046029254386353131, -4417276706812531889


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a batch.

    Attributes:
        ids: One id a sample.
        mask: Real positions, bool `[B, L]`; None if all are.
        contents: Hash of the input of each, padding left out.
    """

    ids: list[Key]
    mask: Tensor | None
    contents: list[str]

    @property
    def length(self) -> int:
        """Padded length, or 0 without a mask."""
        return 0 if self.mask is None else self.mask.shape[1]


def read_samples(ids: Any, inputs: Mapping[str, Any], main: str | None) -> Samples:
    """The samples of a batch.

    Args:
        ids: A list or tensor of ids.
        inputs: Arguments of the model by name.
        main: Name of the argument that says what a sample is, if the model knows it.

    Raises:
        InputError: There is not one id a sample, or the mask is not of shape `[B, L]`.
    """
    keys = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    if odd := [key for key in keys if not isinstance(key, int | str)]:
        raise InputError(f"{odd[0]!r} is no sample id; give whole numbers or texts")
    values = _main_input(inputs, main)
    if len(keys) != values.shape[0]:
        raise InputError(
            f"{len(keys)} sample ids came with a batch of {values.shape[0]}; give one a sample"
        )
    mask = inputs.get(MASK)
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise InputError(
                f"the attention mask has shape {list(mask.shape)}; the prefix cache needs one of "
                "shape [batch, length]: give that, or train without the cache"
            )
        mask = mask.bool()
    else:
        mask = None
    return Samples(keys, mask, [f"{h:x}" for h in content_hashes(values, mask).tolist()])


def content_hashes(values: Tensor, mask: Tensor | None) -> Tensor:
    """A 64-bit hash of each sample, int64 `[B]`, on the device.

    It is the sum of the bits of each element times an odd number that stands for its place among
    the sample's real elements, so that padding does not matter, and of a multiple of their number.

    Args:
        values: `[B, ...]` of any type.
        mask: Real positions `[B, L]`; used if `values` is `[B, L, ...]`.
    """
    bits = values.detach().contiguous().view(BITS[values.element_size()]).to(torch.int64)
    if mask is None or values.shape[:2] != mask.shape:
        bits = bits.reshape(len(values), 1, -1)
        real = torch.ones_like(bits[..., 0])
    else:
        bits = bits.reshape(*mask.shape, -1)
        real = mask.to(torch.int64)
    width = bits.shape[-1]
    place = (real.cumsum(1) * width).unsqueeze(-1) + torch.arange(width, device=bits.device)
    factor = (place * SPREAD) ^ ((place * SPREAD) >> 29)
    terms = bits * (factor * MIX | 1) * real.unsqueeze(-1)
    return terms.sum((1, 2)) + real.sum(1) * (SPREAD ^ MIX)


def split(hidden: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The real positions of each sample on the host, `[n, ...]` each; `[...]` without a mask."""
    host = hidden.detach().cpu()
    if mask is None:
        return list(host.clone().unbind(0))
    return list(torch.split(host[mask.cpu()], mask.sum(1).tolist()))


def fill(hidden: Tensor, rows: Mapping[int, Tensor], mask: Tensor | None) -> None:
    """Put samples into their rows of `hidden`, the inverse of `split`.

    Args:
        hidden: `[B, L, ...]`, or `[B, ...]` without a mask; changed in place.
        rows: Samples by their position in the batch, in rising order.
        mask: Real positions `[B, L]`.
    """
    chosen = torch.tensor(list(rows), device=hidden.device)
    if mask is None:
        hidden[chosen] = torch.stack(list(rows.values())).to(hidden.device)
        return
    where = torch.zeros_like(mask)
    where[chosen] = mask[chosen]
    hidden[where] = torch.cat(list(rows.values())).to(hidden.device)


def _main_input(inputs: Mapping[str, Any], main: str | None) -> Tensor:
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and name != MASK}
    for name in (main, *MAIN_INPUTS):
        if name in tensors:
            return tensors[name]
    if not tensors:
        raise InputError("the model got no tensor; the prefix cache cannot tell its samples")
    return next(iter(tensors.values()))
