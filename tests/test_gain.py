"""The tables of benchmarks/gain.py, and the putting back of components, worked out apart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from scipy import stats

from rgft.models import load_classifier

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GAINS = ((0.0, 0.02, 0.01, 0.3), (0.01, 0.0, 0.03, 0.2))


def runs() -> list[dict]:
    """Two seeds of a task and one of another, of four components."""
    made = []
    for seed, (task, gains) in enumerate((("a", GAINS[0]), ("a", GAINS[1]), ("b", GAINS[0]))):
        parts = [
            {"name": f"bert.encoder.c{i}", "depth": i, "moved": 0.1 * (i % 2)}
            | {"alone": {"accuracy": gain, "loss": gain}}
            | {"below": {"accuracy": sum(gains[: i + 1]), "loss": 1.0}}
            | {"early": None if i == 0 else float(i), "end": 4.0 - i}
            for i, gain in enumerate(gains)
        ]
        made.append({"task": task, "seed": seed, "metric": "accuracy", "components": parts})
    return made


def test_the_tables_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gain_table  # noqa: PLC0415

    gains, correlations = gain_table.page(runs()).split("\n\n")
    lines = gains.splitlines()
    assert lines[0] == "| task | put back | c0 | c1 | c2 | c3 |"
    told = "0.5 ± 0.7 | 1.0 ± 1.4 | 2.0 ± 1.4 | 25.0 ± 7.1"
    assert lines[2] == f"| a | it alone: points | {told} |"
    told = "0.5 ± 0.7 | 1.5 ± 0.7 | 3.5 ± 0.7 | 28.5 ± 6.4"
    assert lines[4] == f"| a | it and all below: points | {told} |"
    assert lines[7] == "| b | it alone: loss | 0.000 | 0.020 | 0.010 | 0.300 |"
    rows = {line.split(" | ")[0].strip("| "): line for line in correlations.splitlines()[2:]}
    for what, sides in {
        "map after a tenth": [(gain[1:], (1, 2, 3)) for gain in GAINS],  # one is not known
        "map at the end": [(gain, (4, 3, 2, 1)) for gain in GAINS],
        "depth": [(gain, (0, 1, 2, 3)) for gain in GAINS],
    }.items():
        first, second = (stats.spearmanr(*side).statistic for side in sides)
        a, b = (first + second) / 2, first
        assert rows[what].split(" | ")[1:4] == [f"{a:+.2f}", f"{b:+.2f}", f"{(a + b) / 2:+.2f}"]


def test_what_is_lost_is_that_of_a_model_with_the_old_weights(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gain  # noqa: PLC0415

    torch.manual_seed(0)
    tuned = load_classifier(str(tiny_model), ("a", "b"), 0)
    batch = {"input_ids": torch.randint(5, 25, (40, 6)), "labels": torch.randint(0, 2, (40,))}
    names = [name for name, _ in tuned.named_parameters() if "encoder.layer.1" in name]
    mixed = copy.deepcopy(tuned)
    before = {name: torch.randn_like(p) / 4 for name, p in tuned.named_parameters()}
    mixed.load_state_dict({name: before[name] for name in names}, strict=False)
    base, without = gain.judged(tuned, [batch]), gain.judged(mixed, [batch])
    assert base["loss"] == pytest.approx(tuned(**batch).loss.item())
    as_it_was = copy.deepcopy(tuned.state_dict())
    found = gain.lost(tuned, before, names, [batch], base)
    assert found["loss"] == pytest.approx(without["loss"] - base["loss"]) and found["loss"] != 0
    assert found["accuracy"] == pytest.approx(base["accuracy"] - without["accuracy"])
    assert all(torch.equal(value, as_it_was[name]) for name, value in tuned.state_dict().items())
