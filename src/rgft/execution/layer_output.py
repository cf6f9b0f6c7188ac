"""What a layer puts out around its hidden states, so that another tensor can stand in for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Shape = tuple[int, ...]


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states that a layer is called with: its first tensor."""
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((value for value in given if isinstance(value, Tensor)), None)


class LayerOutput:
    """Learns the form of a layer's output from real calls."""

    def __init__(self) -> None:
        self._spec: TreeSpec | None = None
        self._leaves: list[Any] = []
        self._place = 0
        self._dtype = torch.float32
        self._shapes: dict[Shape, Shape] = {}  # of a sample: entering, leaving

    @property
    def known(self) -> bool:
        """Whether there was a real call."""
        return self._spec is not None

    def learn(self, output: Any, source: Tensor) -> Tensor | str:
        """The hidden states in an output, or why nothing can stand in for them."""
        leaves, spec = tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(places) != 1:
            return f"puts out {len(places)} tensors, which later layers may need; one can be cached"
        hidden: Tensor = leaves[places[0]]
        if hidden.is_nested or hidden.ndim < 2 or hidden.shape[0] != source.shape[0]:
            return f"turns shape {list(source.shape)} into {list(hidden.shape)}: no row a sample"
        self._spec, self._place, self._dtype = spec, places[0], hidden.dtype
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if hidden.shape != source.shape or self._shapes:
            self._shapes[tuple(source.shape[1:])] = tuple(hidden.shape[1:])
        return hidden

    def around(self, hidden: Tensor) -> Any:
        """An output with other hidden states."""
        assert self._spec is not None
        leaves = list(self._leaves)
        leaves[self._place] = hidden
        return tree_unflatten(leaves, self._spec)

    def blank(self, source: Tensor) -> Tensor | None:
        """Zeros of the shape that would come out; None if that is not known."""
        shape = tuple(source.shape[1:])
        if self._shapes and shape not in self._shapes:
            return None
        shape = self._shapes.get(shape, shape)
        return source.new_zeros((source.shape[0], *shape), dtype=self._dtype)
