"""How far two outputs of a model are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

LEAST = 1e-2  # root mean square below which a difference is taken as absolute
IGNORED = "past_key_values"  # of generation; training does not read them


def largest_difference(wanted: Any, found: Any, mask: Tensor | None) -> float:
    r"""The largest relative difference over all tensors in two outputs.

    $\lVert a - b \rVert / \max(\lVert a \rVert, 10^{-2} \sqrt n)$ for tensors of n elements;
    infinite if the outputs are made up differently, not-a-number if `wanted` is not finite.

    Args:
        wanted: An output: tensors in tuples, dictionaries or model outputs.
        found: Another.
        mask: Real positions `[B, L]`; others are left out of tensors `[B, L, ...]`.
    """
    (left, one), (right, other) = (tree_flatten(_plain(output)) for output in (wanted, found))
    if one != other:
        return math.inf
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, Tensor)]
    apart = [_difference(a, b, mask) for a, b in pairs]
    return math.nan if any(map(math.isnan, apart)) else max(apart, default=0.0)


def _plain(output: Any) -> Any:
    if not isinstance(output, Mapping):
        return output
    return {name: value for name, value in output.items() if name != IGNORED}


def _difference(wanted: Tensor, found: Any, mask: Tensor | None) -> float:
    if not isinstance(found, Tensor) or wanted.shape != found.shape:
        return math.inf
    if not wanted.is_floating_point():
        return 0.0
    if mask is not None and wanted.shape[:2] == mask.shape:
        wanted, found = wanted[mask], found[mask]
    wanted, found = wanted.double(), found.double()
    least = LEAST * math.sqrt(max(wanted.numel(), 1))
    apart, size = float((wanted - found).norm()), float(wanted.norm())
    if math.isfinite(size) and math.isnan(apart):
        return math.inf
    return apart / max(size, least)
