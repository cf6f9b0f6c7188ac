"""Fixtures for whole runs: built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

import torchvision_operators  # noqa: F401 - before transformers

# isort: split
import tiny_run

SMALL = {"train": 32, "validation": 8, "test": 8}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; 120, 40 and 40 rows."""
    return tiny_run.build_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; a few rows, for runs that only have to go through."""
    return tiny_run.build_data(tmp_path_factory.mktemp("small"), rows=SMALL)
