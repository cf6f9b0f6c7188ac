"""Models cut down to their first layers: they run, save and load; what cannot be cut says so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from families import BATCHES, FAMILIES
from rgft import partition
from rgft.errors import InputError
from rgft.structure.cutting import can_cut, keep_layers

CUT = [name for name, build in FAMILIES.items() if can_cut(build())]
WHOLE = [name for name in FAMILIES if name not in CUT]


def test_most_transformers_can_be_cut() -> None:
    assert {"bert", "distilbert", "llama", "gpt2", "vit"} <= set(CUT)
    assert len(CUT) >= 12


@pytest.mark.parametrize("name", CUT)
def test_a_cut_model_runs_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]().eval()
    layers = sum(c.kind == "layer" for c in partition(model, "layer"))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    keep_layers(model, 1)
    assert sum(c.kind == "layer" for c in partition(model, "layer")) == 1 < layers
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    found = model(**BATCHES[name]())
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**BATCHES[name]()).logits, found.logits)


def test_the_last_layer_that_is_left_is_read() -> None:
    """As if the layers after it were the identity."""
    whole = FAMILIES["bert"]().eval()
    cut = copy.deepcopy(whole)
    keep_layers(cut, 1)
    whole.base_model.encoder.layer[1].forward = lambda hidden, *_, **__: hidden
    batch = BATCHES["bert"]()
    torch.testing.assert_close(cut(**batch).logits, whole(**batch).logits)


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_cut_says_so(name: str) -> None:
    with pytest.raises(InputError, match="has no single stack of layers"):
        keep_layers(FAMILIES[name](), 1)


@pytest.mark.parametrize("count", [0, 3])
def test_a_count_that_is_not_there(count: int) -> None:
    with pytest.raises(InputError, match=f"keep_layers is {count}; this model has 2: give 1 to 2"):
        keep_layers(FAMILIES["bert"](), count)


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(InputError, match="train it with all of them"):
        keep_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 1)
