"""A learning rate that is not given is scaled to the model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

import tiny_images
import tiny_run
from rgft.launch import Launch
from rgft.methods import find_method
from rgft.preparation import prepare
from rgft.spec import RunSpec


def own_rate(model: Path, data: Path, method: str, lr: float | None = None) -> float:
    spec = RunSpec(model=str(model), data=str(data), method=method, lr=lr)
    with ExitStack() as until_end:
        return prepare(spec, Launch(), until_end).lr


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.build_model(tmp_path_factory.mktemp("wide"), layers=1, hidden_size=768)


@pytest.mark.parametrize("method", ["full", "rgft"])
def test_a_wide_model_takes_less(method: str, wide: Path, small_data: Path) -> None:
    assert own_rate(wide, small_data, method) == pytest.approx(find_method(method).lr / 2)


def test_a_narrow_one_takes_what_the_method_has(tiny_model: Path, small_data: Path) -> None:
    assert own_rate(tiny_model, small_data, "full") == find_method("full").lr


def test_an_adapter_is_not_of_the_models_width(wide: Path, small_data: Path) -> None:
    assert own_rate(wide, small_data, "lora") == find_method("lora").lr


def test_batch_normalization_takes_more(tmp_path: Path) -> None:
    model = tiny_images.build_model(tmp_path / "model", "efficientnet-lite")
    data = tiny_images.build_data(tmp_path / "data")
    assert own_rate(model, data, "full") == pytest.approx(8 * find_method("full").lr)


def test_a_rate_that_is_given_is_taken(wide: Path, small_data: Path) -> None:
    assert own_rate(wide, small_data, "full", lr=3e-4) == 3e-4
