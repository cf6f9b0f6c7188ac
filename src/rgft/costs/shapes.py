"""Operations on tensors without values: only shapes are worked out, each just once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 4096  # operations; the layers of a model repeat the same few

Operator = Any  # torch._ops.OpOverload, which has no public type
_PLAIN = (Tensor, torch.nn.Parameter)
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_known: dict[Any, Layout] = {}


def call(operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
    """`operator(*args, **kwargs)`.

    On the meta device many operations are written in Python and take longer than on small tensors
    with values. There a result whose memory is its own depends on nothing but the layout of what is
    given and the default type, and is made again from the layout that it had the first time.
    """
    key = _key(operator, args, kwargs)
    if key is None:
        return operator(*args, **kwargs)
    if key not in _known:
        result = operator(*args, **kwargs)
        if result.device.type != "meta" or result.layout is not torch.strided:
            return result
        if len(_known) >= REMEMBERED:
            _known.clear()
        _known[key] = (result.size(), result.stride(), result.dtype)
        return result
    size, stride, dtype = _known[key]
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _key(operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the layout of the result depends on; None where it has to be worked out."""
    if not _makes_one(operator):
        return None
    given = list(leaves((args, kwargs)))
    tensors = [x for x in given if isinstance(x, Tensor)]
    if not tensors or any(type(t) not in _PLAIN or t.device.type != "meta" for t in tensors):
        return None
    named = tuple((name, _layout(x)) for name, x in kwargs.items())
    return operator, torch.get_default_dtype(), _layout(args), named


def leaves(tree: Any) -> Iterator[Any]:
    """What is in lists, tuples and values of dictionaries, at any depth.

    >>> list(leaves(([1, (2, 3)], {"a": 4})))
    [1, 2, 3, 4]
    """
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from leaves(part)
    elif isinstance(tree, dict):
        yield from leaves(tuple(tree.values()))
    else:
        yield tree


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_layout, value))
    return type(value), value


@cache
def _makes_one(operator: Operator) -> bool:
    """Whether it returns one tensor with memory of its own, and writes to none."""
    schema = operator._schema
    every = [*schema.arguments, *schema.returns]
    if any(value.alias_info is not None for value in every):
        return False
    return [str(value.type) for value in schema.returns] == ["Tensor"]
