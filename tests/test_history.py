"""The history: bounded, evenly spaced, and complete while there is room."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgft.history import COLUMNS, History

exact = settings(derandomize=True, deadline=None, max_examples=60)


def row(step: int, size: int) -> np.ndarray:
    values = np.arange(3 * size, dtype=np.float32).reshape(3, size)
    return values + np.float32(step)


def filled(size: int, limit: int, steps: range) -> History:
    history = History(size, limit)
    for step in steps:
        history.append(step, row(step, size))
    return history


@exact
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 300), st.integers(0, 1))
def test_evenly_spaced_and_bounded(size: int, limit: int, count: int, first: int) -> None:
    history = filled(size, limit, range(first, first + count))
    steps = history.steps.tolist()
    # the stride is the smallest power of two at which fewer than `limit` multiples are left
    stride = 1
    while len([s for s in range(first, first + count) if s % stride == 0]) >= limit:
        stride *= 2
    assert history.stride == stride
    assert steps == [s for s in range(first, first + count) if s % stride == 0]
    assert len(history) == len(steps) < limit
    for index, name in enumerate(COLUMNS):
        wanted = [row(s, size)[index] for s in steps]
        assert history.column(name).shape == (len(steps), size)
        assert np.array_equal(history.column(name), np.reshape(wanted, (-1, size)))


@exact
@given(st.integers(2, 20), st.integers(0, 100), st.integers(0, 100))
def test_a_restored_history_goes_on_alike(limit: int, before: int, after: int) -> None:
    whole = filled(2, limit, range(before + after))
    first = filled(2, limit, range(before))
    second = History(2, limit)
    second.load_state_dict(first.state_dict())
    for step in range(before, before + after):
        second.append(step, row(step, 2))
    assert second.steps.tolist() == whole.steps.tolist()
    assert second.stride == whole.stride
    for name in COLUMNS:
        assert np.array_equal(second.column(name), whole.column(name))


def bytes_held(history: History) -> int:
    return sum(r.nbytes for r in history._rows) + sys.getsizeof(history._rows)


def grow(size: int, limit: int, count: int) -> tuple[int, int]:
    """Most rows and bytes ever held."""
    history, rows, held = History(size, limit), 0, 0
    for step in range(count):
        if history.keeps(step):
            history.append(step, np.full((3, size), step, np.float32))
            rows, held = max(rows, len(history)), max(held, bytes_held(history))
    assert rows >= limit // 2
    return rows, held


def test_memory_is_bounded() -> None:
    rows, held = grow(size=50, limit=100, count=5_000)
    assert rows < 100
    assert held < 100 * 3 * 50 * 4 + 2_000


@pytest.mark.slow
def test_memory_is_bounded_in_a_long_run() -> None:
    rows, held = grow(size=500, limit=1000, count=100_000)
    assert rows < 1000
    assert held < 6.1e6


def test_the_state_is_tensors_and_numbers() -> None:
    state = filled(2, 8, range(20)).state_dict()
    assert {type(value) for value in state.values()} == {int, torch.Tensor}
