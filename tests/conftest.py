"""Fixtures for whole runs: built once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the processes that the result is compared with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
