"""The error map against the published recursion, one number at a time."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgft import Component, ErrorMap, InputError
from rgft.history import COLUMNS

exact = settings(derandomize=True, deadline=None, max_examples=60)
SCORES = st.floats(0, 1e120) | st.sampled_from([0.0, 1e-120, math.nan, math.inf])


def parts(size: int) -> list[Component]:
    return [Component(f"c{k}", "layer", k // 2, (), 10 + k) for k in range(size)]


Step = tuple[list[float], list[bool], bool]


@st.composite
def runs(draw: Any) -> tuple[int, list[Step]]:
    size = draw(st.integers(1, 4))
    step = st.tuples(
        st.lists(SCORES, min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
        st.sampled_from([True, True, True, False]),
    )
    return size, draw(st.lists(step, max_size=12))


def by_hand(
    size: int, steps: list[Step], beta: float, corrected: bool
) -> tuple[list[float], int, list[list[float]]]:
    """The map, the steps left out, and the map after each step (NaN: never scored so far)."""
    error, count, skipped = [0.0] * size, [0] * size, 0
    course: list[list[float]] = []
    seen: list[list[float]] = []
    for scores, observed, valid in steps:
        bad = False
        for k in range(size):
            if not (observed[k] and valid):
                continue
            if not math.isfinite(scores[k]):
                bad = True
                continue
            error[k] = beta * error[k] + (1 - beta) * scores[k]
            count[k] += 1
        skipped += bad
        course.append(
            [e / (1 - beta**n) if corrected and n else e for e, n in zip(error, count, strict=True)]
        )
        seen.append([e if n else math.nan for e, n in zip(course[-1], count, strict=True)])
    return course[-1] if course else error, skipped, seen


def follow(size: int, steps: list[Step], beta: float, corrected: bool, **options: Any) -> ErrorMap:
    options = {"dtype": torch.float64} | options
    error_map = ErrorMap(parts(size), beta, bias_correction=corrected, **options)
    for step, (scores, observed, valid) in enumerate(steps, start=1):
        tensor = torch.tensor(scores, dtype=torch.float64)
        error_map.update(tensor, torch.tensor(observed), torch.tensor(valid))
        error_map.record(step, (1.0,) * size)
    return error_map


@pytest.mark.parametrize("corrected", [False, True])
@exact
@given(run=runs(), beta=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1 - 1e-9]))
def test_the_recursion(corrected: bool, run: tuple[int, list[Step]], beta: float) -> None:
    size, steps = run
    wanted, skipped, course = by_hand(size, steps, beta, corrected)
    error_map = follow(size, steps, beta, corrected)
    rel = 1e-6 if beta > 0.9999 and corrected else 1e-12  # the loop's own 1 - beta^t rounds
    assert error_map.values.tolist() == pytest.approx(wanted, rel=rel, abs=0)
    error, left_out, _ = error_map.flush()
    assert error.dtype == torch.float64
    assert error.tolist() == error_map.values.tolist()
    assert left_out == skipped
    found = error_map.history.column("error")
    with np.errstate(over="ignore"):
        narrow = np.reshape(course, (-1, size)).astype(np.float32)
    assert np.allclose(found, narrow, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.999999])
def test_bias_correction_is_exact_in_single_precision(beta: float) -> None:
    """A constant score is returned as it is from the first step on."""
    error_map = ErrorMap(parts(1), beta, bias_correction=True)
    for _ in range(5):
        error_map.update(torch.tensor([3.0]))
        assert error_map.values.item() == pytest.approx(3.0, rel=1e-6)


def test_all_are_observed_by_default_and_extra_numbers_come_along() -> None:
    error_map = ErrorMap(parts(2), 0.5)
    error_map.update(torch.tensor([2.0, 4.0]))
    error, skipped, more = error_map.flush(torch.tensor([7, 9]))
    assert (error.tolist(), skipped, more.tolist()) == ([1.0, 2.0], 0, [7.0, 9.0])


def test_the_history_tells_what_was_observed() -> None:
    steps: list[Step] = [
        ([1.0, 2.0], [True, True], True),
        ([3.0, 4.0], [True, False], True),
        ([math.nan, 6.0], [True, True], True),
        ([7.0, 8.0], [True, True], False),
    ]
    table = follow(2, steps, 0.5, False).to_pandas()
    assert list(table.columns) == ["step", "component", "kind", "depth", *COLUMNS]
    scores = table.pivot(index="step", columns="component", values="score").to_numpy()
    wanted = [[1, 2], [3, math.nan], [math.nan, 6], [math.nan, math.nan]]
    assert np.array_equal(scores, np.array(wanted), equal_nan=True)
    errors = table.pivot(index="step", columns="component", values="error").to_numpy()
    assert errors.tolist() == [[0.5, 1], [1.75, 1], [1.75, 3.5], [1.75, 3.5]]
    assert table["depth"].tolist() == [0, 0] * 4
    assert table["kind"].tolist() == ["layer"] * 8
    assert table["step"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_pending_rows_are_bounded_without_a_decision() -> None:
    error_map = ErrorMap(parts(3), 0.9, history_rows=16)
    for step in range(1, 500):
        error_map.update(torch.ones(3))
        error_map.record(step, (1.0, 0.0, 2.0))
        assert len(error_map._pending) <= 16
        assert len(error_map.history) < 16
    assert len(error_map.to_pandas()) == 3 * len(error_map.history)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(torch.nan_to_num(left, nan=-1.0), torch.nan_to_num(right, nan=-1.0))
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    else:
        assert left == right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@exact
@given(run=runs(), corrected=st.booleans(), rows=st.integers(2, 8))
def test_state_goes_round(
    dtype: torch.dtype, run: tuple[int, list[Step]], corrected: bool, rows: int
) -> None:
    size, steps = run
    options = {"dtype": dtype, "history_rows": rows}
    half = len(steps) // 2
    whole = follow(size, steps, 0.9, corrected, **options)
    first = follow(size, steps[:half], 0.9, corrected, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ErrorMap(parts(size), 0.9, bias_correction=corrected, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    for step, (scores, observed, valid) in enumerate(steps[half:], start=half + 1):
        tensor = torch.tensor(scores, dtype=torch.float64)
        second.update(tensor, torch.tensor(observed), torch.tensor(valid))
        second.record(step, (1.0,) * size)
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(derandomize=True, deadline=None, max_examples=15)
@given(run=runs(), corrected=st.booleans())
def test_parquet_goes_round(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    run: tuple[int, list[Step]],
    corrected: bool,
) -> None:
    size, steps = run
    path = tmp_path_factory.mktemp("maps") / "map.parquet"
    written = follow(size, steps, 0.9, corrected, dtype=dtype, history_rows=8)
    written.to_parquet(path)
    read = ErrorMap.from_parquet(path)
    assert read.components == written.components
    assert (read.beta, read.bias_correction) == (0.9, corrected)
    assert_same(read.values, written.values)
    assert_same(read.history.state_dict(), written.history.state_dict())
    assert read.history.limit == 8
    assert read.flush()[1] == written.flush()[1]
    assert read.to_pandas().equals(written.to_pandas())
    assert [p.name for p in path.parent.iterdir()] == ["map.parquet"]


def a_map(path: Path) -> Path:
    follow(2, [([1.0, 2.0], [True, True], True)] * 5, 0.9, False).to_parquet(path)
    return path


def test_any_parquet_reader_reads_it(tmp_path: Path) -> None:
    table = pq.read_table(a_map(tmp_path / "map.parquet")).to_pandas()
    assert table["score"].tolist() == [1.0, 2.0] * 5
    assert set(table["component"]) == {"c0", "c1"}


def rewritten(path: Path, change: Any) -> None:
    """The file with what `change` makes of its table and facts."""
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"rgft"])
    table = change(table, facts)
    metadata = {**table.schema.metadata, b"rgft": json.dumps(facts)}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def without_fact(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    facts.pop("components")
    return table


def other_facts(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    facts["components"] = 3
    return table


def without_column(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    del facts
    return table.drop_columns(["error"])


def without_rows(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    del facts
    return table.slice(0, 7)


DAMAGE: dict[str, Any] = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("step,component\n1,a\n"),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-50]),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "folder": lambda p: (p.unlink(), p.mkdir()),
    "another table": lambda p: pq.write_table(pa.table({"a": [1]}), p),
    "not json": lambda p: pq.write_table(
        pa.table({"a": [1]}).replace_schema_metadata({b"rgft": b"{"}), p
    ),
    "no components": lambda p: rewritten(p, without_fact),
    "wrong components": lambda p: rewritten(p, other_facts),
    "no column": lambda p: rewritten(p, without_column),
    "rows lost": lambda p: rewritten(p, without_rows),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = a_map(tmp_path / "map.parquet")
    DAMAGE[damage](path)
    with pytest.raises(InputError, match="is not an error map that rgft wrote") as caught:
        ErrorMap.from_parquet(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_byte_in_the_middle_is_refused_or_harmless(tmp_path: Path) -> None:
    path = a_map(tmp_path / "map.parquet")
    whole, wanted = path.read_bytes(), ErrorMap.from_parquet(path).components
    for position in range(4, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert len(ErrorMap.from_parquet(path).components) <= len(wanted)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("absent", ["pandas", "pyarrow"])
def test_a_missing_extra_is_named(
    absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    error_map = ErrorMap([Component("a", "layer", 0, (), 1)], 0.5)
    with pytest.raises(InputError, match=r"pip install 'rgft\[train\]'"):
        error_map.to_parquet(tmp_path / "map.parquet")
    assert not list(tmp_path.iterdir())
