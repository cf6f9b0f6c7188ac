"""What pyproject.toml asks for is what is tested: the oldest versions, and the newest."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["train"])]
MORE = [Requirement(text) for text in EXTRAS["integrations"]]


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    matrix: Any = importlib.import_module("matrix")
    return {name: matrix.versions(path) for name, path in matrix.LOCKS.items()}


def test_lower_bounds_are_what_the_oldest_environment_has(
    locks: dict[str, dict[str, str]],
) -> None:
    oldest = locks["oldest"]
    tested = [*NEEDED, *(one for one in MORE if one.name in oldest)]
    assert {one.name: str(one.specifier) for one in tested} == {
        one.name: f">={oldest[one.name]}" for one in tested
    }
    assert {one.name for one in tested} >= {"transformers", "peft", "accelerate", "trl"}


def test_the_newest_environment_has_what_is_asked_for(locks: dict[str, dict[str, str]]) -> None:
    for one in (*NEEDED, *MORE):
        assert one.specifier.contains(locks["newest"][one.name]), one
