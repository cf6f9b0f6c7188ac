"""What the page of the language model says of runs that are missing, and of rates at an edge."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("llm"), importlib.import_module("llm_table")


def swept(llm: ModuleType, losses: dict[float, float], method: str = "lora") -> dict[Any, Any]:
    """Records of a sweep, by their losses."""
    return {
        llm.Cell("sweep", "gsm8k", method, rate, 25, 0): {"metrics": {"validation": {"loss": loss}}}
        for rate, loss in losses.items()
    }


def test_what_has_no_record_is_named(modules: tuple[ModuleType, ModuleType]) -> None:
    llm, table = modules
    done = swept(llm, {5e-4: 1.0})
    for task in llm.SHAPES:
        for method in llm.RATES:
            done[llm.Cell("main", task, method, 1e-3, 150, 0)] = {}
    for method in ("rgft-lora", "rgft", "full"):
        done |= swept(llm, dict.fromkeys(llm.RATES[method], 1.0), method)
    told = "Without a record so far: `lora` at 0.002 for the choice of the rate"
    assert table.missing(done) == f"{told}."
    del done[llm.Cell("main", "scitldr", "rgft", 1e-3, 150, 0)]
    del done[llm.Cell("main", "scitldr", "full", 1e-3, 150, 0)]
    assert table.missing(done) == f"{told}; `rgft`, `full` on SciTLDR."
    done |= swept(llm, {2e-3: 1.0})
    done |= {llm.Cell("main", "scitldr", m, 1e-3, 150, 0): {} for m in ("rgft", "full")}
    assert table.missing(done) == ""


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({1e-4: 3.0, 2e-4: 2.0, 4e-4: 1.0}, "`lora` (0.0004, the largest)."),
        ({1e-4: 1.0, 2e-4: 2.0, 4e-4: 3.0}, "`lora` (0.0001, the smallest)."),
        ({1e-4: 2.0, 2e-4: 1.0, 4e-4: 3.0}, ""),
        ({1e-4: 2.0, 4e-4: 1.0}, ""),  # the sweep goes on
    ],
)
def test_a_rate_at_the_edge_of_its_sweep_is_named(
    losses: dict[float, float],
    said: str,
    modules: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, table = modules
    monkeypatch.setitem(table.RATES, "lora", (1e-4, 2e-4, 4e-4))
    told = table.edges(swept(llm, losses))
    assert told.endswith(said) and bool(told) == bool(said)
