"""The tables of benchmarks/gain.py, and the putting back of components, worked out apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GAINS = ((0.0, 0.02, 0.01, 0.3), (0.01, 0.0, 0.03, 0.2))


def runs() -> list[dict]:
    """Two seeds of a task and one of another, of four components."""
    made = []
    for seed, (task, gains) in enumerate((("a", GAINS[0]), ("a", GAINS[1]), ("b", GAINS[0]))):
        parts = [
            {"name": f"bert.encoder.c{i}", "depth": i, "gain": gain, "moved": 0.1 * (i % 2)}
            | {"early": None if i == 0 else float(i), "end": 4.0 - i}
            for i, gain in enumerate(gains)
        ]
        made.append({"task": task, "seed": seed, "components": parts})
    return made


def test_the_tables_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gain_table  # noqa: PLC0415

    gains, correlations = gain_table.page(runs()).split("\n\n")
    assert gains.splitlines()[0] == "| task | c0 | c1 | c2 | c3 |"
    assert gains.splitlines()[2] == "| a | 0.5 ± 0.7 | 1.0 ± 1.4 | 2.0 ± 1.4 | 25.0 ± 7.1 |"
    assert gains.splitlines()[3] == "| b | 0.0 | 2.0 | 1.0 | 30.0 |"
    rows = {line.split(" | ")[0].strip("| "): line for line in correlations.splitlines()[2:]}
    for what, sides in {
        "map after a tenth": [(gain[1:], (1, 2, 3)) for gain in GAINS],  # one is not known
        "map at the end": [(gain, (4, 3, 2, 1)) for gain in GAINS],
        "depth": [(gain, (0, 1, 2, 3)) for gain in GAINS],
    }.items():
        first, second = (stats.spearmanr(*side).statistic for side in sides)
        a, b = (first + second) / 2, first
        assert rows[what].split(" | ")[1:4] == [f"{a:+.2f}", f"{b:+.2f}", f"{(a + b) / 2:+.2f}"]


def test_weights_are_put_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gain  # noqa: PLC0415

    before, tuned = nn.Linear(2, 3), nn.Linear(2, 3)
    last = dict(tuned.named_parameters())
    kept = {"weight": last["weight"].detach().clone()}
    gain.put(last, {"weight": before.weight})
    assert torch.equal(tuned.weight, before.weight)
    assert not torch.equal(tuned.bias, before.bias)
    gain.put(last, kept)
    assert torch.equal(tuned.weight, kept["weight"])
