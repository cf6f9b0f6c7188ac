"""Plans: what they say of components."""

from __future__ import annotations

import pytest

from rgft import Component, Plan

PARTS = tuple(
    Component(name, "layer", depth, (), 1)
    for name, depth in (("a", 0), ("b", 1), ("c", 1), ("d", 4))
)


@pytest.mark.parametrize(
    ("scale", "trained", "boundary"),
    [
        ((1.0, 1.0, 1.0, 1.0), (True, True, True, True), 0),
        ((0.0, 0.0, 0.5, 2.0), (False, False, True, True), 1),
        ((0.0, 0.0, 0.0, 1e-9), (False, False, False, True), 4),
        ((3.0, 0.0, 0.0, 0.0), (True, False, False, False), 0),
    ],
)
def test_trained_and_boundary(
    scale: tuple[float, ...], trained: tuple[bool, ...], boundary: int
) -> None:
    plan = Plan(PARTS, scale)
    assert plan.trained == trained
    assert plan.boundary == boundary
    assert [plan[c.name] for c in PARTS] == list(scale)


def test_words() -> None:
    assert str(Plan(PARTS[:2], (0.0, 1.25))) == "a: frozen\nb: x1.25"
    with pytest.raises(KeyError):
        Plan(PARTS[:1], (1.0,))["e"]
