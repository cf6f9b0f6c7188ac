"""Updates of slices that are corrected together, against a loop over single slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rgft.execution.binding import Binding
from rgft.execution.slices import SliceUpdates
from slicings import DTYPES, random_binding, random_gradients

SCALES = (0.0, 0.0, 0.3, 1e-4, 1.0, 1.0, 1.7)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def elements(
    binding: Binding, optimizer: torch.optim.Optimizer
) -> dict[tuple[nn.Parameter, str], Tensor]:
    """Copies of all weights and of the optimizer's values for them."""
    found = {(p, "weight"): p.detach().clone() for p in binding.parameters.values()}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                found[p, key] = value.clone()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_move_by_their_multipliers_and_frozen_ones_keep_their_bits(
    dtype: torch.dtype,
) -> None:
    seen = set()
    for seed in range(30):
        binding, optimizer = random_binding(seed, dtype)
        random = np.random.default_rng(seed)
        updates = SliceUpdates(binding)
        with torch.no_grad():
            for parameter in binding.parameters.values():
                parameter.flatten()[:2] = -0.0  # a sum that should change nothing loses the sign
        for round_ in range(3):
            scale = random.choice(SCALES, len(binding.components)).tolist()
            updates.adopt(scale)
            random_gradients(binding, 10 * seed + round_, missing=0.0)
            before = elements(binding, optimizer)
            updates.enter(optimizer)
            optimizer.step()
            stepped = elements(binding, optimizer)
            updates.leave(optimizer)
            after = elements(binding, optimizer)
            for piece in binding.pieces:
                largest = max(binding.scales_of(piece.parameter, scale))
                own, part = scale[piece.component], piece.slice
                for (p, key), value in after.items():
                    if p is not piece.parameter:
                        continue
                    new, made = part.of(value), part.of(stepped[p, key])
                    old = part.of(before.get((p, key), torch.zeros_like(value)))
                    if own == 0 < largest:
                        seen.add("frozen")
                        assert torch.equal(bits(new), bits(old))
                    elif own == largest or key != "weight":
                        seen.add("largest")
                        assert torch.equal(bits(new), bits(made))
                    else:
                        seen.add("scaled")
                        wanted = old.double() + own / largest * (made.double() - old.double())
                        # to the nearest number of that precision, for half precision
                        size = float(torch.cat([old, made]).double().abs().max())
                        finer = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
                        torch.testing.assert_close(
                            new.double(),
                            wanted,
                            rtol=0.5 * float(torch.finfo(dtype).eps),
                            atol=4 * size * float(finer),
                        )
    assert seen == {"frozen", "largest", "scaled"}


def test_nothing_is_copied_where_all_slices_have_one_multiplier() -> None:
    binding, optimizer = random_binding(0, torch.float32)
    updates = SliceUpdates(binding)
    updates.adopt([0.5] * len(binding.components))
    random_gradients(binding, 0, missing=0.0)
    updates.enter(optimizer)
    optimizer.step()
    stepped = elements(binding, optimizer)
    updates.leave(optimizer)
    for key, value in elements(binding, optimizer).items():
        assert torch.equal(value, stepped[key])


def test_not_even_infinite_weights_move_while_frozen() -> None:
    binding, optimizer = random_binding(1, torch.float32)
    updates = SliceUpdates(binding)
    shared = next(p for p, d in binding.divisions.items() if len(set(d.owners)) > 1)
    first = binding.divisions[shared].owners[0]
    updates.adopt([0.0 if k == first else 0.5 + k for k in range(len(binding.components))])
    with torch.no_grad():
        shared.fill_(torch.inf)
    random_gradients(binding, 1, missing=0.0)
    updates.enter(optimizer)
    with torch.no_grad():
        shared.zero_()
    updates.leave(optimizer)
    for piece in binding.pieces:
        if piece.parameter is shared and piece.component == first:
            assert torch.isinf(piece.weight).all()
