"""Models of nothing but parameters, divided among components at random."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice
from rgft.execution.binding import Binding, Piece, bind

SHAPES = ((6,), (4, 6), (6, 4), (2, 6, 3), (8,), (1,))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random_binding(seed: int, dtype: torch.dtype) -> tuple[Binding, torch.optim.Optimizer]:
    """Parameters that are whole or cut, into rows, columns or the middle of three dimensions."""
    random = np.random.default_rng(seed)
    model = nn.ParameterDict()
    held: list[list[ParameterSlice]] = [[] for _ in range(5)]
    for index, shape in enumerate(SHAPES):
        name = f"p{index}"
        # ordinary sizes, so that half precision holds them
        model[name] = nn.Parameter(torch.from_numpy(random.standard_normal(shape)).to(dtype))
        if random.random() < 0.25:
            held[random.integers(5)].append(ParameterSlice(name))
            continue
        dim = int(random.integers(len(shape)))
        inner = random.permutation(np.arange(1, shape[dim]))[: random.integers(0, 4)]
        bounds = [0, *sorted(inner.tolist()), shape[dim]]
        for start, stop in pairwise(bounds):
            held[random.integers(5)].append(ParameterSlice(name, dim, start, stop))
    components = []
    for k, slices in enumerate(held):
        numel = sum(part.of(model[part.parameter]).numel() for part in slices)
        components.append(Component(f"c{k}", "custom", k, tuple(slices), numel))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, eps=1e-3)  # half precision has no 1e-8
    return bind(model, optimizer, components), optimizer


def random_gradients(binding: Binding, seed: int, *, missing: float) -> None:
    """A gradient for each parameter, but for a share of them."""
    random = np.random.default_rng(seed + 1000)
    for parameter in binding.parameters.values():
        values = random.standard_normal(parameter.shape)
        absent = random.random() < missing
        parameter.grad = None if absent else torch.from_numpy(values).to(parameter.dtype)


def numbers(pieces: list[Piece], tensors: dict[nn.Parameter, Tensor]) -> np.ndarray:
    """What the tensors of the pieces' parameters hold in them, as float64, one after another."""
    parts = [p.slice.of(tensors[p.parameter]).double().numpy().ravel() for p in pieces]
    return np.concatenate(parts) if parts else np.zeros(0)
