"""Visits of an epoch: unbiased over all outcomes, shared among processes, resumed exactly."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from outcomes import offsets
from rgft import visits
from rgft.batch_order import by_length, evened
from rgft.errors import InputError
from rgft.residuals import Ledger
from rgft.sampling import systematic, weighted_loss
from rgft.visits import VisitSampler

exact = settings(derandomize=True, deadline=None, max_examples=60)
RESIDUALS = [0.1, 2.0, 0.2, 3.0, 0.3, 1.1, 0.1]


def ledger_of(residuals: list[float]) -> Ledger:
    ledger = Ledger(len(residuals), beta=0)
    ledger.update(torch.arange(len(residuals)), torch.tensor(residuals))
    return ledger


def large(size: int = 200) -> Ledger:
    generator = torch.Generator().manual_seed(1)
    return ledger_of((torch.rand(size, generator=generator) ** 4).tolist())


def sampler_of(ledger: Ledger, **settings: Any) -> VisitSampler:
    return VisitSampler(ledger, **{"batch_size": 4, "epochs": 6, "full_pass": 0, **settings})


def shares(ledger: Ledger, ranks: int, **settings: Any) -> list[VisitSampler]:
    return [sampler_of(ledger, rank=r, ranks=ranks, **settings) for r in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rule", ["below-mean", "proportional"])
@pytest.mark.parametrize("lengths", [None, [3, 1, 4, 1, 5, 9, 2]])
def test_an_epoch_has_the_full_gradient_as_expectation(
    ranks: int, rule: str, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    parameter = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)

    def losses_of(rows: Tensor) -> Tensor:
        return (torch.tanh(inputs[rows] @ parameter) - 1).square()

    ledger, batch_size = ledger_of(RESIDUALS), 2
    (full,) = torch.autograd.grad(losses_of(torch.arange(7)).sum() / batch_size, parameter)
    # the order of the samples is that of the seed; over all offsets the draw takes every outcome
    found: list[Tensor] = []

    def listening(p: Tensor, offset: float) -> Tensor:
        found.append(p)
        return systematic(p, offset)

    monkeypatch.setattr(visits, "systematic", listening)
    sorted(sampler_of(ledger, skip=0.5, rule=rule))
    expected, sizes = torch.zeros_like(full), set()
    for chance, offset in offsets(found[0]):
        monkeypatch.setattr(visits, "systematic", lambda p, _, at=offset: systematic(p, at))
        for sampler in shares(
            ledger, ranks, skip=0.5, rule=rule, lengths=lengths, batch_size=batch_size
        ):
            loader = DataLoader(range(7), batch_size=batch_size, sampler=sampler)
            for ids in loader:
                loss = weighted_loss(losses_of(ids), sampler.weights[ids], batch_size)
                expected += chance * torch.autograd.grad(loss, parameter)[0]
            sizes.add(sampler.visits)
            assert abs(sampler.visits - sampler.expected_visits) < ranks + 1
    assert max(sizes) < 7 + ranks - 1 or ranks > 1
    assert min(sizes) < 7
    assert torch.allclose(expected, full, rtol=0, atol=1e-12)


def test_biased_weights_are_one() -> None:
    sampler = sampler_of(ledger_of(RESIDUALS), unbiased=False)
    visited = list(sampler)
    assert len(visited) < 7
    assert sampler.weights[visited].tolist() == [1.0] * len(visited)
    assert sampler.weights.sum() == len(visited)


def test_hard_samples_always_come_and_easy_ones_by_turns() -> None:
    ledger = large()
    easy = ledger.residual < ledger.residual.mean()
    sampler = sampler_of(ledger, skip=0.5, epochs=40)
    count = torch.zeros(200)
    for _ in range(40):
        count += torch.bincount(torch.tensor(list(sampler)), minlength=200)
    assert (count[~easy] == 40).all()
    assert (count[easy] > 5).all() and (count[easy] < 35).all()
    assert count[easy].mean().item() == pytest.approx(20, abs=0.2)


def test_the_first_epoch_is_full_because_nothing_is_seen() -> None:
    sampler = sampler_of(Ledger(9), skip=0.9)
    visited = list(sampler)
    assert sorted(visited) == list(range(9))
    assert visited != list(range(9))
    assert sampler.weights.tolist() == [1.0] * 9


@pytest.mark.parametrize(
    ("epochs", "full_pass", "full"),
    [
        (3, 0.125, [False, False, True]),
        (8, 0.125, [False] * 7 + [True]),
        (8, 0.13, [False] * 6 + [True] * 2),
        (10, 0.3, [False] * 7 + [True] * 3),
        (5, 0.8, [False] + [True] * 4),  # 5 x (1 - 0.8) rounds to less than 1
        (2.5, 0.125, [False, False, True]),
        (2.1, 0.125, [False, True, True]),
        (2.5, 0, [False, False, False]),
        (2, 1, [True, True]),
        (0.5, 0.125, [True]),
    ],
)
def test_the_last_epochs_visit_everything(
    epochs: float, full_pass: float, full: list[bool]
) -> None:
    sampler = sampler_of(large(), epochs=epochs, full_pass=full_pass)
    assert [len(list(sampler)) == 200 for _ in full] == full


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = sampler_of(large(), seed=3)
    epochs = [list(first) for _ in range(3)]
    torch.manual_seed(2)
    assert [list(second) for second in [sampler_of(large(), seed=3)] * 3] == epochs
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(sampler_of(large(), seed=4)) != epochs[0]
    jumped = sampler_of(large(), seed=3)
    jumped.set_epoch(2)
    assert (list(jumped), jumped.epoch) == (epochs[2], 2)


@pytest.mark.parametrize("size", [8, 200, 201, 203])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("skip", [0.0, 0.5])
def test_shares_are_disjoint_and_of_equal_length(size: int, ranks: int, skip: float) -> None:
    samplers = shares(large(size), ranks, skip=skip)
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {len(samplers[0])}
    assert all(torch.equal(samplers[0].weights, other.weights) for other in samplers)
    together = [sample for part in parts for sample in part]
    alone = list(sampler_of(large(size), skip=skip))
    assert set(together) == set(alone)
    repeated = len(together) - len(alone)
    assert repeated == -len(alone) % ranks  # no repeats where it divides evenly
    # process by process, visit by visit, they are the draw of a single process
    merged = [sample for step in zip(*parts, strict=True) for sample in step]
    assert merged[: len(alone)] == alone
    assert merged[len(alone) :] == alone[:repeated]


def test_a_repeated_visit_shares_its_weight() -> None:
    samplers = shares(Ledger(5), 2)
    parts = [list(sampler) for sampler in samplers]
    assert len(parts[0]) == len(parts[1]) == 3
    total = torch.zeros(5, dtype=torch.float64)
    for sampler, part in zip(samplers, parts, strict=True):
        for sample in part:
            total[sample] += sampler.weights[sample]
    assert total.tolist() == [1.0] * 5
    assert sorted(samplers[0].weights.tolist()) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_fewer_visits_than_processes(size: int) -> None:
    parts = [list(sampler) for sampler in shares(Ledger(size), 4)]
    assert len({len(part) for part in parts}) == 1
    assert {sample for part in parts for sample in part} == set(range(size))


# resuming


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """The state through a file, as a checkpoint would have it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    result: dict[str, Any] = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    return result


def train(
    sampler: VisitSampler, ledger: Ledger, epochs: int, stop: int | None = None
) -> list[tuple[list[int], list[float]]]:
    """Batches with their weights; losses depend on sample and epoch. Stops after `stop` batches."""
    loader, batches = DataLoader(range(len(ledger)), batch_size=4, sampler=sampler), []
    while sampler.epoch < epochs:
        for ids in loader:
            epoch = sampler.epoch
            batches.append((ids.tolist(), sampler.weights[ids].tolist()))
            ledger.update(ids, ((ids * 7 + epoch * 3) % 11).float())
            if len(batches) == stop:
                return batches
        if sampler.epoch == epochs - 1:
            return batches
    return batches


@pytest.mark.parametrize("lengths", [None, [k * 5 % 13 for k in range(22)]])
def test_stopped_anywhere_it_goes_on_exactly(lengths: list[int] | None) -> None:
    whole_ledger = Ledger(22)
    whole = train(sampler_of(whole_ledger, lengths=lengths), whole_ledger, 4)
    assert 3 * 4 < len(whole) < 6 * 4  # something was skipped
    for stop in range(1, len(whole)):
        ledger = Ledger(22)
        sampler = sampler_of(ledger, lengths=lengths)
        before = train(sampler, ledger, 4, stop)
        state = stored({"ledger": ledger.state_dict(), "sampler": sampler.state_dict()})
        ledger = Ledger(22)
        sampler = sampler_of(ledger, lengths=lengths)
        ledger.load_state_dict(state["ledger"])
        sampler.load_state_dict(state["sampler"])
        assert before + train(sampler, ledger, 4) == whole, stop
        assert torch.equal(ledger.residual, whole_ledger.residual)


def test_a_loader_that_fetches_ahead_says_how_far_training_is() -> None:
    sampler = sampler_of(large())
    first = list(sampler)  # all handed out, eight trained on
    ahead, state = sampler.state_dict(), sampler.state_dict(position=8)
    restored = sampler_of(large())
    restored.load_state_dict(stored(state))
    assert (restored.epoch, len(restored), list(restored)) == (0, len(first), first[8:])
    assert list(restored) == list(sampler)
    skipping = sampler_of(large())
    skipping.load_state_dict(stored(ahead))
    assert skipping.epoch == 1 and "visits" not in ahead


def test_a_loop_that_skips_by_itself_gets_the_whole_epoch_again() -> None:
    """As the Trainer: it sets the epoch, and passes over what has been trained on."""
    ledger = large()
    sampler = sampler_of(ledger)
    list(sampler)
    second = iter(sampler)
    begun = [next(second) for _ in range(8)]
    state = stored(sampler.state_dict(position=0))
    ledger.update(torch.arange(200), torch.rand(200))  # would change the draw
    rest = list(second)
    restored = sampler_of(ledger)
    restored.load_state_dict(state)
    restored.set_epoch(1)
    assert list(restored) == begun + rest
    assert len(list(restored)) == len(list(sampler))


def test_a_restored_place_outlasts_setting_its_epoch() -> None:
    sampler = sampler_of(large())
    first = list(sampler)
    restored = sampler_of(large())
    restored.load_state_dict(stored(sampler.state_dict(position=8)))
    restored.set_epoch(0)
    assert list(restored) == first[8:]


def test_an_epoch_set_again_begins_anew() -> None:
    sampler = sampler_of(large())
    first = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert sampler.epoch == 0


def test_an_iterator_left_over_does_not_count() -> None:
    sampler = sampler_of(large())
    left = iter(sampler)
    next(left)
    now = iter(sampler)
    next(now), next(left)
    assert (sampler.epoch, sampler.state_dict()["position"]) == (1, 1)


def test_a_new_sampler_is_restored_too() -> None:
    fresh = sampler_of(large())
    restored = sampler_of(large())
    restored.load_state_dict(stored(fresh.state_dict()))
    assert list(restored) == list(fresh)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"ranks": 2}, {"seed": 1}])
def test_refuses_a_state_of_other_settings(change: dict[str, int]) -> None:
    sampler = sampler_of(large())
    next(iter(sampler))
    name, value = next(iter(change.items()))
    with pytest.raises(InputError, match=f"with {name} .*, not {value}"):
        sampler_of(large(), **change).load_state_dict(sampler.state_dict())
    with pytest.raises(InputError, match="with samples 200, not 9"):
        sampler_of(large(9)).load_state_dict(sampler.state_dict())


def test_refuses_positions_that_are_none() -> None:
    sampler = sampler_of(large())
    with pytest.raises(InputError, match="has not begun"):
        sampler.state_dict(position=4)
    list(sampler)
    with pytest.raises(InputError, match=f"allowed: 0 to {len(sampler)}"):
        sampler.state_dict(position=201)
    with pytest.raises(InputError, match="position is -1"):
        sampler.state_dict(position=-1)


# lengths


@exact
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 4), st.integers(1, 3))
def test_by_length_sorts_within_buckets(lengths: list[int], batch: int, bucket: int) -> None:
    size, of = len(lengths), torch.tensor(lengths, dtype=torch.int64)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    result = by_length(order, of, batch, bucket, torch.Generator().manual_seed(0)).tolist()
    whole = size // batch * batch
    wanted, rest = order[:whole].tolist(), order[whole:].tolist()
    pieces = []
    for start in range(0, whole, batch * bucket):
        block = sorted(wanted[start : start + batch * bucket], key=lambda i: lengths[i])
        pieces += [tuple(block[k : k + batch]) for k in range(0, len(block), batch)]
    found = [tuple(result[k : k + batch]) for k in range(0, whole, batch)]
    assert sorted(found) == sorted(pieces)
    assert sorted(result[whole:]) == sorted(rest)


def padding(visited: list[int], lengths: Tensor, batch: int) -> int:
    rows = [lengths[visited[k : k + batch]] for k in range(0, len(visited), batch)]
    return int(sum(len(row) * row.max() - row.sum() for row in rows))


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_of_like_lengths_have_little_padding(ranks: int) -> None:
    lengths = torch.randint(5, 200, (200,), generator=torch.Generator().manual_seed(0))
    for sampler in shares(large(), ranks, lengths=lengths, bucket=25 // ranks):
        plain = sampler_of(large(), rank=sampler.rank, ranks=ranks)
        visited, other = list(sampler), list(plain)
        assert 4 * padding(visited, lengths, 4) < padding(other, lengths, 4)
        means = torch.tensor([lengths[visited[k : k + 4]].float().mean() for k in range(0, 96, 4)])
        assert (means.diff() < 0).sum() > 5  # short and long batches are mixed over the epoch


@exact
@given(st.integers(0, 30), st.integers(1, 8))
def test_evened_is_the_next_multiple(size: int, ranks: int) -> None:
    result = evened(torch.arange(size), ranks).tolist()
    assert len(result) == math.ceil(size / ranks) * ranks
    assert result == [k % size for k in range(len(result))]


# wrong use


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"bucket": 0}, "bucket is 0"),
        ({"ranks": 0}, "ranks is 0"),
        ({"rank": 1}, "rank is 1; allowed: below ranks"),
        ({"rank": -1}, "rank is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": math.inf}, "epochs is inf"),
        ({"full_pass": 1.5}, "full_pass is 1.5"),
        ({"skip": 1.0}, "skip is 1.0"),
        ({"rule": "hardest"}, "rule is 'hardest'"),
        ({"lengths": [1, 2]}, "2 lengths for 7 samples"),
    ],
)
def test_refuses_settings(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sampler_of(ledger_of(RESIDUALS), **change)


PROCESS = """
import sys
import torch, torch.distributed as dist
from rgft.errors import InputError
from rgft.residuals import Ledger
from rgft.visits import VisitSampler

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
ledger = Ledger(20, beta=0)
sampler = VisitSampler(ledger, batch_size=2, epochs=3, full_pass=0, rank=rank, ranks=2)
print("first", sorted(sampler))
residuals = torch.arange(20.0)
ledger.update(torch.arange(20), residuals if rank == 0 else residuals.flip(0))
try:
    list(sampler)
except InputError as error:
    print(error)
dist.destroy_process_group()
"""


def test_processes_that_drew_differently_are_told(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    firsts = [eval(out.splitlines()[0].removeprefix("first ")) for out, _ in results]
    assert sorted(firsts[0] + firsts[1]) == list(range(20))
    assert all("the processes drew different visits" in out for out, _ in results)
