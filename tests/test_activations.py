"""Stored activations come back as they were, or not at all."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgft.activations import ActivationStore
from rgft.activations.encoding import decode, encode, from_bytes, to_bytes
from rgft.errors import InputError

FLOATS = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def states(count: int, seed: int = 0) -> dict[int | str, Tensor]:
    """Tensors of differing lengths; every other id is a text."""
    random = torch.Generator().manual_seed(seed)
    return {
        (i if i % 2 else f"row {i}"): torch.randn(1 + i % 5, 6, generator=random)
        for i in range(count)
    }


def filled(store: ActivationStore, values: dict[int | str, Tensor]) -> ActivationStore:
    for key, value in values.items():
        assert store.put(key, value, tag=f"of {key}")
    return store


def assert_holds(store: ActivationStore, values: dict[int | str, Tensor]) -> None:
    assert set(store) == set(values)
    for key, value in values.items():
        found = store.get(key)
        assert found is not None and torch.equal(found, value)
        assert store.tag(key) == f"of {key}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_bytes_are_the_encoding(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    encoded = encode(torch.randn(shape, dtype=dtype), kind)
    data = bytearray(to_bytes(encoded))
    assert len(data) == encoded.nbytes
    again = from_bytes(data, shape, dtype, kind)
    assert again is not None
    assert torch.equal(decode(again), decode(encoded)) and decode(again).dtype == dtype
    assert from_bytes(data + b"?", shape, dtype, kind) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_is_exact(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5, dtype=dtype)
    assert torch.equal(decode(encode(values, "float32")), values)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=1, max_size=5))
def test_errors_stay_within_their_bounds(rows: list[list[float]]) -> None:
    exact = torch.tensor(rows, dtype=torch.float64)
    values = exact.float()
    largest = exact.abs().amax(-1, keepdim=True)
    short = decode(encode(values, "bfloat16")).double()
    assert ((short - exact).abs() <= exact.abs() * 2**-8 + 1e-37).all()
    byte = decode(encode(values, "int8")).double()
    assert ((byte - exact).abs() <= largest / 254 * (1 + 1e-4) + 1e-37).all()


def test_a_row_that_is_not_finite_spoils_itself_alone() -> None:
    values = torch.tensor([[1.0, torch.inf], [torch.nan, 0.0], [1.0, 0.5]])
    found = decode(encode(values, "int8"))
    assert found[:2].isnan().all()
    assert torch.allclose(found[2], values[2], atol=1 / 254)


def test_what_is_kept_does_not_follow_the_tensor() -> None:
    store, value = ActivationStore(), torch.ones(3)
    store.put(0, value)
    value.zero_()
    found = store.get(0)
    assert found is not None
    found.zero_()
    assert torch.equal(store.get(0), torch.ones(3))


@pytest.mark.parametrize("memory", [0, 100, 10**6])
def test_memory_is_bounded_and_the_rest_in_a_file(memory: int) -> None:
    values = states(60)
    store = filled(ActivationStore(memory_bytes=memory), values)
    total = sum(v.nbytes for v in values.values())
    assert_holds(store, values)
    assert store.memory_used <= memory
    assert store.disk_used == (0 if memory > total else total - store.memory_used)
    store.close()
    assert len(store) == 0


def test_a_temporary_folder_goes_with_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    closed, dropped = (filled(ActivationStore(memory_bytes=0), states(3)) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 2
    closed.close()
    assert len(list(tmp_path.iterdir())) == 1
    del dropped
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("memory", [0, 10**6])
def test_a_later_run_finds_a_folder(tmp_path: Path, memory: int, kind: str) -> None:
    values = states(20)
    first = filled(ActivationStore(tmp_path, format=kind, memory_bytes=memory), values)
    kept = {key: first.get(key) for key in first}
    first.close()
    second = ActivationStore(tmp_path, format=kind, memory_bytes=memory)
    assert_holds(second, kept)
    assert (second.memory_used > 0) == (memory > 0)


def test_replaced_and_removed_entries_leave_no_room_unused(tmp_path: Path) -> None:
    old, new = states(30, seed=1), states(30, seed=2)
    store = filled(ActivationStore(tmp_path, memory_bytes=0), old)
    for _ in range(4):
        store.flush()
        filled(store, new)
    store.remove(1)
    new.pop(1)
    assert_holds(store, new)
    store.close()
    # space is given out again once the index does not lead there
    size = (tmp_path / "activations.bin").stat().st_size
    assert size <= 2 * sum(v.nbytes for v in old.values())
    assert_holds(ActivationStore(tmp_path), new)


def test_a_killed_run_leaves_what_its_index_says(tmp_path: Path) -> None:
    values = states(300)
    program = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_activations import *
store = filled(ActivationStore({str(tmp_path)!r}, memory_bytes=0), states(300))
filled(store, dict(list(states(300, seed=9).items())[:20]))  # since the index was written
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = ActivationStore(tmp_path)
    assert len(store) == 256
    assert_holds(store, {key: values[key] for key in store})


@pytest.mark.parametrize("place", [0, 37, -1])
def test_a_damaged_byte_is_detected(tmp_path: Path, place: int) -> None:
    values = states(10)
    filled(ActivationStore(tmp_path), values).close()
    data = np.fromfile(tmp_path / "activations.bin", np.uint8)
    data[place] ^= 1
    data.tofile(tmp_path / "activations.bin")
    store = ActivationStore(tmp_path)
    with pytest.warns(RuntimeWarning, match="damaged"):
        missing = {key for key in values if store.get(key) is None}
    assert len(missing) == store.damaged == 1
    assert_holds(store, {key: value for key, value in values.items() if key not in missing})


def test_every_damaged_byte_of_the_index_is_detected(tmp_path: Path) -> None:
    values = states(3)
    filled(ActivationStore(tmp_path, fingerprint="f"), values).close()
    index = tmp_path / "activations.json"
    sound = index.read_bytes()
    for place in range(len(sound) - 1):
        index.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = ActivationStore(tmp_path, fingerprint="f")
            found = {key: store.get(key) for key in store}
        assert caught or set(found) == set(values)
        for key, value in found.items():
            assert value is None or torch.equal(value, values[key])
        filled(store, values).close()


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other weights"},
        {"format": "bfloat16"},
    ],
)
def test_a_foreign_folder_is_never_used(tmp_path: Path, change: dict[str, str]) -> None:
    filled(ActivationStore(tmp_path, fingerprint="these weights"), states(5)).close()
    name = next(iter(change))
    with pytest.warns(RuntimeWarning, match=f"not used: its {name} is"):
        store = ActivationStore(tmp_path, **{"fingerprint": "these weights", **change})
    assert len(store) == 0
    store.close()
    assert (tmp_path / "activations.bin").stat().st_size == 0


def test_a_cut_file_is_never_used(tmp_path: Path) -> None:
    filled(ActivationStore(tmp_path), states(5)).close()
    (tmp_path / "activations.bin").write_bytes(b"short")
    with pytest.warns(RuntimeWarning, match="data file has been cut"):
        assert len(ActivationStore(tmp_path)) == 0


def test_a_folder_follows_its_label(tmp_path: Path) -> None:
    values = states(5)
    store = filled(ActivationStore(tmp_path, fingerprint="a"), values)
    store.relabel("b")
    header = (tmp_path / "activations.json").read_text().split("\n")[0]
    assert json.loads(header)["fingerprint"] == "b"
    assert_holds(ActivationStore(tmp_path, fingerprint="b"), values)
    store.clear()
    assert len(ActivationStore(tmp_path, fingerprint="b")) == 0


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """A real error of the operating system where a file would grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("given_folder", [True, False])
def test_a_full_disk_ends_storing_with_a_warning(tmp_path: Path, given_folder: bool) -> None:
    values = states(60)
    store = ActivationStore(tmp_path if given_folder else None, memory_bytes=500)
    with files_up_to(1000), pytest.warns(RuntimeWarning, match="no longer be written") as caught:
        stored = {key: value for key, value in values.items() if store.put(key, value, f"of {key}")}
    assert len(caught) == 1
    assert store.disk_used <= 1000 and store.memory_used <= 500
    assert 0 < len(stored) < len(values)
    assert_holds(store, stored)
    store.close()


def test_room_on_the_disk_is_left_to_others(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, memory_bytes=0, free_bytes=2**62)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert not store.put(0, torch.ones(2))
    assert store.get(0) is None


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format is 'int4'; choose one of float32"):
        ActivationStore(format="int4")
    with pytest.raises(InputError, match="memory_bytes is -1"):
        ActivationStore(memory_bytes=-1)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        ActivationStore(tmp_path / "file")
    with pytest.raises(InputError, match=r"activations are torch\.int64"):
        ActivationStore().put(0, torch.tensor([1]))


def test_the_first_entries_can_be_kept(tmp_path: Path) -> None:
    """As they were at a checkpoint: in the order in which they were put, in a later run too."""
    with_folder = ActivationStore(tmp_path, fingerprint="f")
    for key in range(5):
        with_folder.put(key, torch.full((3,), float(key)))
    with_folder.put(1, torch.full((3,), 9.0))  # anew: now the last
    with_folder.close()
    later = ActivationStore(tmp_path, fingerprint="f")
    later.keep_first(3)
    assert list(later) == [0, 2, 3]
    assert later.get(3).tolist() == [3.0] * 3
    assert later.disk_used == 3 * 12
    later.keep_first(7)
    assert len(later) == 3
    later.close()
