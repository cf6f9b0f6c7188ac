"""The residual ledger: against a plain loop, in few transfers, and restored exactly."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import rgft
from rgft import residuals
from rgft.errors import InputError
from rgft.processes import Processes
from rgft.residuals import Ledger, rounds
from rgft.sample_kinds import KINDS, sample_kinds
from workers import launch

exact = settings(derandomize=True, deadline=None, max_examples=80)
SIZE = 5
Visit = tuple[int, float, bool | None]

loss = st.one_of(
    st.floats(-10, 10, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
)
same_batch = st.booleans().flatmap(
    lambda judged: st.lists(
        st.tuples(st.integers(0, SIZE - 1), loss, st.booleans() if judged else st.none()),
        max_size=7,
    )
)


class Plain:
    """The ledger as a loop over visits."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.residual, self.last = [math.nan] * SIZE, [math.nan] * SIZE
        self.visits, self.judged = [0] * SIZE, [0] * SIZE
        self.correct, self.forgotten = [0] * SIZE, [0] * SIZE
        self.right: list[bool] = [False] * SIZE
        self.skipped = 0

    def visit(self, sample: int, loss: float, right: bool | None) -> None:
        if not math.isfinite(loss):
            self.skipped += 1
            return
        before = self.residual[sample]
        smoothed = self.beta * before + (1 - self.beta) * loss
        self.residual[sample] = loss if math.isnan(before) else smoothed
        self.last[sample] = loss
        self.visits[sample] += 1
        if right is None:
            return
        self.judged[sample] += 1
        self.correct[sample] += right
        self.forgotten[sample] += self.right[sample] and not right
        self.right[sample] = right


def feed(ledger: Ledger, batch: Sequence[Visit]) -> None:
    ids, losses, right = ([visit[k] for visit in batch] for k in range(3))
    correct = None if None in right else torch.tensor(right, dtype=torch.bool)
    ids = torch.tensor(ids, dtype=torch.int64)
    ledger.update(ids, torch.tensor(losses, dtype=torch.float32), correct)


@exact
@given(st.lists(same_batch, max_size=8), st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 5))
def test_equals_a_plain_loop(batches: list[list[Visit]], beta: float, every: int) -> None:
    ledger, plain = Ledger(SIZE, beta=beta, every=every), Plain(beta)
    for batch in batches:
        feed(ledger, batch)
        for visit in batch:
            plain.visit(*visit)
    for name in ("residual", "last", "visits", "judged", "correct", "forgotten"):
        assert np.array_equal(getattr(ledger, name).numpy(), getattr(plain, name), equal_nan=True)
    assert ledger.skipped == plain.skipped
    assert ledger.seen.tolist() == [count > 0 for count in plain.visits]


def test_comes_to_the_host_only_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.numel())
        return tensor.detach().clone()

    monkeypatch.setattr(residuals, "to_host", counted)
    ledger = Ledger(8, every=4)
    for _ in range(11):
        ledger.update(torch.arange(8), torch.ones(8), torch.ones(8, dtype=torch.bool))
    assert len(moved) == 2
    assert ledger.visits.tolist() == [11] * 8
    assert len(moved) == 3
    assert ledger.residual.tolist() == [1.0] * 8
    assert len(moved) == 3


def test_takes_losses_in_half_precision_and_keeps_no_graph() -> None:
    ledger = Ledger(2)
    parameter = torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True)
    ledger.update(torch.tensor([0, 1], dtype=torch.int32), parameter * 1)
    assert not ledger._pending[0].requires_grad
    assert ledger.residual.tolist() == [1.5, 2.5]


def test_what_was_read_does_not_change() -> None:
    ledger = Ledger(1)
    ledger.update(torch.tensor([0]), torch.tensor([1.0]))
    before = ledger.residual
    ledger.update(torch.tensor([0]), torch.tensor([3.0]))
    assert ledger.residual.item() == 2.0
    assert before.item() == 1.0


@exact
@given(st.lists(same_batch, max_size=5), st.lists(same_batch, max_size=5))
def test_restored_it_goes_on_alike(before: list[list[Visit]], after: list[list[Visit]]) -> None:
    whole, first, second = (Ledger(SIZE, every=3) for _ in range(3))
    for batch in before:
        feed(whole, batch)
        feed(first, batch)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    feed(second, [(0, 7.0, None)])  # pending, and to be dropped
    second.load_state_dict(torch.load(io.BytesIO(stored.getvalue()), weights_only=True))
    for batch in after:
        feed(whole, batch)
        feed(second, batch)
    wanted, found = whole.state_dict(), second.state_dict()
    assert wanted.keys() == found.keys()
    assert wanted["skipped"] == found["skipped"]
    for name in residuals.STATE:
        assert wanted[name].dtype == found[name].dtype
        assert np.array_equal(
            wanted[name].numpy(), found[name].numpy(), equal_nan=name in {"residual", "last"}
        )


def test_a_state_is_a_copy() -> None:
    ledger = Ledger(1)
    state = ledger.state_dict()
    ledger.update(torch.tensor([0]), torch.tensor([1.0]))
    assert ledger.visits.item() == 1
    assert state["visits"].item() == 0
    ledger.load_state_dict(state)
    ledger.update(torch.tensor([0]), torch.tensor([1.0]))
    assert ledger.visits.item() == 1
    assert state["visits"].item() == 0


def test_refuses_the_state_of_other_data() -> None:
    with pytest.raises(InputError, match="saved ledger has 3 samples, this one 4"):
        Ledger(4).load_state_dict(Ledger(3).state_dict())


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.tensor([0, 1]), ONE), r"shapes \(2,\), \(1,\)"),
        ((torch.tensor(0), torch.tensor(1.0)), "one loss a sample"),
        ((torch.tensor([[0]]), torch.ones(1, 1)), "one loss a sample"),
        ((torch.tensor([0]), ONE, torch.tensor([True, False])), "shapes"),
        ((torch.tensor([0.0]), ONE), "ids are torch.float32"),
        ((torch.tensor([True]), ONE), "ids are torch.bool"),
        ((torch.tensor([0]), ONE, torch.tensor([1])), "correctness is torch.int64"),
        ((torch.tensor([2]), ONE), "sample 2 is not in the ledger; allowed: 0 to 1"),
        ((torch.tensor([-1]), ONE), "sample -1 is not in the ledger"),
    ],
)
def test_refuses_updates_that_do_not_fit(arguments: tuple[Any, ...], said: str) -> None:
    ledger = Ledger(2)
    with pytest.raises(InputError, match=said) as refused:
        ledger.update(*arguments)
    assert "\n" not in str(refused.value)
    assert ledger.visits.tolist() == [0, 0]


@pytest.mark.parametrize(
    "given_settings",
    [
        {"samples": 0},
        {"samples": True},
        {"samples": 2.0},
        {"beta": 1.0},
        {"beta": -0.1},
        {"beta": math.nan},
        {"beta": "0.5"},
        {"every": 0},
    ],
)
def test_refuses_settings(given_settings: dict[str, Any]) -> None:
    name, value = next(iter(given_settings.items()))
    with pytest.raises(InputError, match=f"{name} is .*; allowed"):
        Ledger(**{"samples": 3, **given_settings})
    assert repr(value)


@exact
@given(st.lists(st.integers(0, 4), max_size=20))
def test_rounds_hold_distinct_ids_in_order_of_occurrence(ids: list[int]) -> None:
    found = [rows.tolist() for rows in rounds(torch.tensor(ids, dtype=torch.int64))]
    occurrence = [ids[:i].count(ids[i]) for i in range(len(ids))]
    wanted = [
        [i for i in range(len(ids)) if occurrence[i] == k]
        for k in range(max(occurrence, default=-1) + 1)
    ]
    assert [sorted(rows) for rows in found] == wanted


def test_is_public() -> None:
    assert rgft.Ledger is Ledger


# kinds


def kinds(residual: list[float], **counts: list[int]) -> list[str]:
    size = len(residual)
    counted = {
        name: torch.tensor(counts.get(name, [default] * size))
        for name, default in {"visits": 2, "correct": 1, "forgotten": 0}.items()
    }
    codes = sample_kinds(torch.tensor(residual, dtype=torch.float64), **counted)
    return [KINDS[code] for code in codes]


def test_easy_is_below_the_mean_and_hard_is_not() -> None:
    assert kinds([1.0, 2.0, 3.0]) == ["easy", "hard", "hard"]


def test_equal_residuals_are_hard_though_their_mean_may_round_up() -> None:
    assert kinds([0.1] * 3) == ["hard"] * 3


def test_unseen_ones_do_not_count_for_the_mean() -> None:
    found = kinds([1.0, math.nan, 3.0], visits=[1, 0, 1], correct=[1, 0, 1])
    assert found == ["easy", "unseen", "hard"]
    assert kinds([math.nan], visits=[0]) == ["unseen"]


def test_forgotten_comes_before_easy_and_hard() -> None:
    assert kinds([1.0, 2.0, 3.0], forgotten=[1, 0, 2]) == ["forgotten", "hard", "forgotten"]


@pytest.mark.parametrize(
    ("residual", "visits", "correct", "kind"),
    [
        (9.0, 2, 0, "suspect"),
        (9.0, 1, 0, "hard"),  # once is not throughout
        (9.0, 2, 1, "hard"),  # was right at some time
        # quartiles of 1, 2, 3, 4 and x are 2 and 4, so that the fence is at 7
        (7.0, 2, 0, "hard"),
        (7.1, 2, 0, "suspect"),
    ],
)
def test_suspect_is_an_outlier_that_was_never_right(
    residual: float, visits: int, correct: int, kind: str
) -> None:
    found = kinds(
        [1.0, 2.0, 3.0, 4.0, residual], visits=[2, 2, 2, 2, visits], correct=[1, 1, 1, 1, correct]
    )
    assert found == ["easy", "easy", "easy" if residual > 5 else "hard", "hard", kind]


# tables


def filled() -> Ledger:
    ledger = Ledger(6, beta=0.5)
    ids = torch.arange(5)
    losses = torch.tensor([0.1, 0.2, 0.1, 0.3, 9.0])
    ledger.update(ids, losses, torch.tensor([True, True, True, True, False]))
    ledger.update(ids, losses, torch.tensor([True, True, False, True, False]))
    ledger.update(torch.tensor([0]), torch.tensor([torch.nan]))
    return ledger


def test_as_a_table() -> None:
    table = filled().to_pandas()
    assert list(table) == ["sample", "residual", "visits", "correct", "forgotten", "kind"]
    assert table["sample"].tolist() == list(range(6))
    assert table["residual"].tolist()[:5] == pytest.approx([0.1, 0.2, 0.1, 0.3, 9.0])
    assert math.isnan(table["residual"][5])
    assert table["visits"].tolist() == [2, 2, 2, 2, 2, 0]
    assert table["correct"].tolist()[:5] == [2, 2, 1, 2, 0]
    assert table["forgotten"].tolist()[:5] == [0, 0, 1, 0, 0]
    assert table["correct"][5] is pd.NA and table["forgotten"][5] is pd.NA
    assert table["kind"].tolist() == ["easy", "easy", "forgotten", "easy", "suspect", "unseen"]


def test_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "residuals.parquet"
    ledger = filled()
    ledger.write(path)
    pd.testing.assert_frame_equal(pd.read_parquet(path), ledger.to_pandas())
    facts = json.loads(pq.read_schema(path).metadata[residuals.METADATA])
    assert facts == {"beta": 0.5, "skipped": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("absent", ["pandas", "pyarrow"])
def test_without_the_libraries_it_says_what_to_install(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(InputError, match="pip install"):
        filled().write(tmp_path / "residuals.parquet")
    assert not list(tmp_path.iterdir())


def shared() -> dict[str, Any]:
    """Three updates, of a different number of samples on each process."""
    rank = dist.get_rank()
    ledger = Ledger(5, every=2)
    ledger.share(Processes())
    for ids, losses, right in SHARED:
        here = slice(rank * 2, 2 if rank == 0 else None)
        ledger.update(ids[here], losses[here], right[here])
    return ledger.state_dict()


SEEN = (([0, 1, 2], [0.5, 2.0, 3.0]), ([3, 2], [1.5, 0.1]), ([4, 0, 1, 1], [1.0] * 4))
SHARED = [
    (torch.tensor(ids), torch.tensor(losses), torch.tensor(losses) < 1) for ids, losses in SEEN
]


def test_shared_ledgers_take_in_what_all_processes_have_seen(tmp_path: Path) -> None:
    whole = Ledger(5)
    for visit in SHARED:
        whole.update(*visit)
    wanted = whole.state_dict()
    for found in launch(2, shared, tmp_path / "two"):
        for name, values in wanted.items():
            if isinstance(values, torch.Tensor):
                torch.testing.assert_close(found[name], values, rtol=0, atol=0, equal_nan=True)
