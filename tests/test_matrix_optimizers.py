"""The table of optimizers is whole, and says what it takes to run it."""

from __future__ import annotations

from pathlib import Path

import yaml

import optimizers

TABLE = Path(__file__).parent / "matrix" / "optimizers.yaml"
CELLS = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
EVERY = {*optimizers.OWN_STATE, *optimizers.GROUP_STATE, *optimizers.ONE_RATE}


def test_every_optimizer_has_a_row_and_every_row_all_columns() -> None:
    columns: dict[str, set[str]] = {}
    for cell in CELLS:
        columns.setdefault(cell["row"], set()).add(cell["column"])
    assert set(columns) >= EVERY
    assert len({frozenset(columns[row]) for row in EVERY}) == 1


def test_a_cell_that_a_plain_setup_skips_says_what_it_needs() -> None:
    assert {cell["row"]: cell["needs"] for cell in CELLS if "needs" in cell} == optimizers.NEEDS
    assert all("needs" in c for c in CELLS if c["row"] in optimizers.NEEDS and "test" in c)
