"""Classifiers with an encoder and a decoder, which read a text by its end token."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tiny_texts
from rgft.errors import InputError
from rgft.inspection import inspect_model
from rgft.spec import RunSpec
from rgft.train import run


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_texts.build_model(tmp_path_factory.mktemp("t5") / "model", "t5")


def test_it_is_inspected(t5: Path) -> None:
    rows = inspect_model(str(t5), "layer")
    assert {row["kind"] for row in rows} >= {"embedding", "layer", "head"}


def test_it_trains_within_its_budget(t5: Path, small_data: Path, tmp_path: Path) -> None:
    spec = RunSpec(model=str(t5), data=str(small_data), budget="0.5", epochs=4, batch_size=4)
    record = run(spec, tmp_path / "run")
    assert record["status"] == "finished"
    assert record["flops"]["share"] == pytest.approx(0.5, abs=0.05)


def test_a_tokenizer_without_an_end_is_refused(t5: Path, small_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in t5.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(t5)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(model)
    spec = RunSpec(model=str(model), data=str(small_data))
    with pytest.raises(InputError, match="ends no text with the model's end token"):
        run(spec, tmp_path / "run")
