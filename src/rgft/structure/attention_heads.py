"""What each head of an attention owns: rows of its input projections, columns of the output's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rgft.structure.head_ownership import UnmeasurableError, measure
from rgft.structure.projections import (
    Portion,
    Projection,
    UnsplittableError,
    find_projections,
    listed,
    portions,
)

_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead")


@dataclass(frozen=True, slots=True)
class Head:
    """An attention head.

    Attributes:
        name: "head.3" or "kv_head.1".
        kind: "attention_head", or "kv_head" for keys and values that several heads read.
        portions: Rows of the input projections (biases too), columns of the output projection.
    """

    name: str
    kind: str
    portions: tuple[Portion, ...]


def split_heads(attention: nn.Module, config: object, known: dict[object, Tensor]) -> list[Head]:
    """The query heads of an attention, then its key-value heads if several queries share them.

    Args:
        attention: A module that holds q, k, v and output projections, separate or fused.
        config: The model's configuration, asked for the number of heads if the module has none.
        known: Ownership found so far, by kind of attention; spares measuring like layers again.

    Raises:
        UnsplittableError: If the projections are not recognised or mix heads.
    """
    builtin = [m for m in attention.modules() if isinstance(m, nn.MultiheadAttention)]
    if builtin:
        return _builtin_heads(builtin[0])
    inputs, out = find_projections(attention)
    heads = _head_count(attention, config)
    if out.inputs % heads:
        raise UnsplittableError(
            f"{out.name} takes {out.inputs} features, not a multiple of {heads}"
        )
    shapes = tuple((p.name, p.inputs, p.outputs, p.transposed) for p in (*inputs, out))
    key = (type(attention), shapes, heads)
    if key not in known:
        known[key] = _ownership(attention, inputs, out, heads)
    return _owned(inputs, out, known[key])


def _head_count(attention: nn.Module, config: object) -> int:
    """The number of query heads that the attention, else its configuration, states."""
    modules: list[object] = list(attention.modules())
    own = [c for module in modules if (c := getattr(module, "config", None)) is not None]
    for holders in (modules, own or [config]):
        stated = {getattr(holder, name, None) for holder in holders for name in _HEAD_COUNTS}
        counts = {count for count in stated if isinstance(count, int) and count > 0}
        if len(counts) == 1:
            return counts.pop()
    raise UnsplittableError("the number of attention heads is not stated")


def _ownership(
    attention: nn.Module, inputs: list[Projection], out: Projection, heads: int
) -> Tensor:
    """Which heads read which projected feature: bool [features of all inputs, heads].

    It is measured; separate q, k, v whose attention does not run alone go by their shapes.
    """
    expected = _by_shape(inputs, out, heads) if len(inputs) == 3 else None
    try:
        measured = measure(attention, inputs, out, heads)
    except UnmeasurableError as error:
        if expected is None:
            raise UnsplittableError(
                f"{error}, so the layout of {inputs[0].name} is open"
            ) from error
        return expected
    if expected is not None and not torch.equal(measured, expected):
        raise UnsplittableError(f"{listed([*inputs, out])} do not keep heads one after the other")
    return measured


def _by_shape(inputs: list[Projection], out: Projection, heads: int) -> Tensor:
    """Ownership of separate q, k, v: one head after the other, key-value heads for groups."""
    size = out.inputs // heads
    q, k, v = (p.outputs for p in inputs)
    if q != out.inputs or k != v or k % size or heads % (k // size):
        raise UnsplittableError(f"q, k, v have {q}, {k}, {v} features for {heads} heads of {size}")
    own = torch.eye(heads, dtype=torch.bool)
    shared = own.reshape(k // size, -1, heads).any(1)
    return torch.cat([each.repeat_interleave(size, 0) for each in (own, shared, shared)])


def _owned(inputs: list[Projection], out: Projection, owners: Tensor) -> list[Head]:
    """Heads from ownership; features that several heads read make key-value heads."""
    heads = owners.shape[1]
    size = out.inputs // heads
    queries: list[list[Portion]] = [[] for _ in range(heads)]
    shared: dict[tuple[int, ...], list[Portion]] = {}
    for projection, own in zip(
        inputs, torch.split(owners, [p.outputs for p in inputs]), strict=True
    ):
        for start, stop, readers in _runs(own):
            alone = len(readers) == 1
            target = queries[readers[0]] if alone else shared.setdefault(readers, [])
            target.extend(projection.rows(start, stop))
    grouped = sorted(head for readers in shared for head in readers)
    if not all(queries) or grouped not in ([], list(range(heads))):
        raise UnsplittableError(f"{listed([*inputs, out])} mix heads")
    for head, held in enumerate(queries):
        held.extend(out.columns(head * size, (head + 1) * size))
    return _named(queries, [shared[readers] for readers in sorted(shared)])


def _runs(owners: Tensor) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Stretches of features with the same readers: start, stop, readers."""
    changes = (owners[1:] != owners[:-1]).any(1).nonzero().flatten() + 1
    for start, stop in pairwise([0, *changes.tolist(), len(owners)]):
        yield start, stop, tuple(owners[start].nonzero().flatten().tolist())


def _named(queries: list[list[Portion]], shared: list[list[Portion]]) -> list[Head]:
    found = [Head(f"head.{i}", "attention_head", tuple(p)) for i, p in enumerate(queries)]
    return found + [Head(f"kv_head.{i}", "kv_head", tuple(p)) for i, p in enumerate(shared)]


def _builtin_heads(attention: nn.MultiheadAttention) -> list[Head]:
    """Heads of torch's own attention, whose layout is documented: q, k, v, each head by head."""
    width, size = attention.embed_dim, attention.head_dim
    fused = attention.in_proj_weight
    apart = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    out = Projection("out_proj", attention.out_proj, width, width, False)
    heads = []
    for start in range(0, width, size):
        held: list[Portion] = []
        for i, weight in enumerate(apart):
            first, last = i * width + start, i * width + start + size
            held += portions([(fused, 0), (attention.in_proj_bias, 0)], 3 * width, first, last)
            held += portions([(weight, 0)], width, start, start + size)
        heads.append(held + out.columns(start, start + size))
    return _named(heads, [])
