"""Methods that leave samples out: of backward (Selective-Backprop), of epochs (InfoBatch)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flops import counted_flops
from rgft import FlopMeter, InputError, Ledger
from rgft.loss_percentiles import LossPercentiles
from rgft.spec import RunSpec
from rgft.train import run
from rgft.visits import VisitSampler
from runs import CutError, assert_same, cut_at_save
from test_policies import exact
from tiny import bert, tokens


@pytest.fixture
def spec(tiny_model: Path, tiny_data: Path) -> RunSpec:
    given_ = {"model": str(tiny_model), "data": str(tiny_data), "batch_size": 8, "evaluations": 2}
    return RunSpec(**given_, epochs=2, lr=1e-3)  # type: ignore[arg-type]


@exact
@given(
    st.lists(st.lists(st.sampled_from([0.1, 0.5, 2.0, 3.0]), min_size=1, max_size=6), max_size=5),
    st.sampled_from([1.0, 2.0, 3.0]),
    st.integers(1, 12),
)
def test_probability_is_a_power_of_the_percentile(
    batches: list[list[float]], beta: float, recent: int
) -> None:
    chooser, seen = LossPercentiles(beta, seed=0, recent=recent), list[float]()
    for batch in batches:
        seen = [*seen, *batch][-recent:]
        wanted = [(sum(other <= loss for other in seen) / len(seen)) ** beta for loss in batch]
        found = chooser.probabilities(torch.tensor(batch, dtype=torch.float64))
        assert found.tolist() == pytest.approx(wanted)


def test_a_third_is_chosen_and_mostly_the_hard_ones() -> None:
    chooser, random = LossPercentiles(2.0, seed=0), torch.Generator().manual_seed(1)
    chosen = []
    for _ in range(400):
        losses = torch.rand(16, generator=random)
        rows = chooser.choose(losses)
        assert rows.tolist() == sorted(set(rows.tolist()))
        chosen.append(losses[rows])
    found = torch.cat(chosen)
    assert len(found) / 6400 == pytest.approx(1 / 3, abs=0.03)
    assert found.mean() == pytest.approx(3 / 4, abs=0.03)  # of the density 3 x^2


def test_at_least_the_hardest_is_chosen() -> None:
    chooser = LossPercentiles(50.0, seed=0)
    chooser.probabilities(torch.full((900,), 9.0))
    for _ in range(20):
        assert chooser.choose(torch.tensor([0.1, 0.3, 0.2])).tolist() == [1]


def test_a_first_look_is_spent_and_counts_as_a_batch_of_full_fine_tuning() -> None:
    (batch,) = tokens()
    plain = bert()
    forward, backward = counted_flops(plain, batch)
    few = {name: value[:1] for name, value in batch.items()}
    part = sum(counted_flops(plain, few))
    model = bert()
    meter = FlopMeter(model)
    with torch.no_grad(), meter.previewing():
        model(**batch)
    assert (meter.spent, meter.full, meter.batches) == (forward, forward + backward, 1)
    with meter.probing():
        model(**few)
    assert (meter.spent, meter.full, meter.batches) == (forward + part, forward + backward, 1)


def test_selective_backprop_sees_every_sample_and_learns_from_a_third(
    spec: RunSpec, tmp_path: Path
) -> None:
    selective = run(replace(spec, method="selective-backprop"), tmp_path / "selective")
    whole = run(replace(spec, method="full"), tmp_path / "full")
    assert selective["flops"]["full"] == whole["flops"]["full"]
    assert 0.55 < selective["flops"]["share"] < 0.85  # a third, and a third of three thirds
    table = pd.read_parquet(tmp_path / "selective" / "residuals.parquet")
    assert (table["visits"] == 2).all()


@pytest.mark.parametrize(("method", "budget"), [("selective-backprop", None), ("infobatch", "0.9")])
def test_what_is_left_out_resumes_to_the_same_bits(
    spec: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    budget: str | None,
) -> None:
    given_ = replace(spec, method=method, budget=budget)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(given_, whole)
    with monkeypatch.context() as patched, pytest.raises(CutError):
        cut_at_save(patched, 2)
        run(given_, cut)
    run(given_, cut, resume=True)
    assert_same(whole, cut)


def test_infobatch_skips_and_needs_a_budget(spec: RunSpec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'infobatch' leaves samples out, which takes effect with"):
        run(replace(spec, method="infobatch"), tmp_path / "none")
    record = run(replace(spec, method="infobatch", budget="1", epochs=4), tmp_path / "run")
    table = pd.read_parquet(tmp_path / "run" / "residuals.parquet")
    assert abs(record["flops"]["share"] - 1) < 0.03
    assert table["visits"].max() - table["visits"].min() >= 2


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"skip": 0.5}, "skip is 0.5, but the method 'selective-backprop' chooses samples itself"),
        ({"prefix_cache": "int8"}, "prefix_cache is 'int8', but the method 'selective-backprop'"),
    ],
)
def test_what_selective_backprop_has_no_use_for_is_refused(
    spec: RunSpec, tmp_path: Path, option: dict[str, Any], said: str
) -> None:
    given_ = {"method": "selective-backprop", "budget": "0.9", "settings": {"frozen_below": 2}}
    with pytest.raises(InputError, match=said):
        run(replace(spec, **given_, **option), tmp_path / "run")


def test_nothing_is_skipped_at_the_end_of_the_run() -> None:
    ledger, over = Ledger(64), 0.0
    ledger.update(torch.arange(64), torch.arange(64.0))
    sampler = VisitSampler(ledger, batch_size=8, epochs=9, full_pass=0.125, over=lambda: over)
    assert len(list(sampler)) == 48  # half of the half below the mean
    over = 0.86
    assert len(list(sampler)) == 48
    over = 0.875
    assert len(list(sampler)) == 64
