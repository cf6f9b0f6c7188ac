"""Each cell of the table of optimizers and features names a test that is there, or a reason."""

from __future__ import annotations

import importlib
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


def test_every_cell_is_a_test_that_is_there_or_a_reason() -> None:
    for cell in CELLS:
        (kind,) = cell.keys() - {"row", "column"}
        assert kind in {"test", "refused", "not_applicable"}
        if kind != "test":
            assert cell[kind]
            continue
        file, _, name = cell["test"].partition("::")
        name, _, case = name.partition("[")
        found = getattr(importlib.import_module(Path(file).stem), name)
        if case:
            (mark,) = (m for m in found.pytestmark if m.name == "parametrize")
            assert case.removesuffix("]") in list(mark.args[1])
