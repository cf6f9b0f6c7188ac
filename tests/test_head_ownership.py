"""Ownership is measured on attentions of every layout, from their modules alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES
from rgft.structure.architecture import blocks, outline
from rgft.structure.head_ownership import UnmeasurableError, measure
from rgft.structure.projections import find_projections

HEADS = 4
MEASURED = ("bert", "roberta", "distilbert", "albert", "electra", "t5", "bart", "gpt2", "gpt_neox")
MEASURED += ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "vit")


def attentions_of(model: nn.Module) -> list[nn.Module]:
    found = [block for part in outline(model) for block in blocks(part)]
    return [block.module for block in found if block.module is not None]


@pytest.mark.parametrize("name", MEASURED)
def test_every_feature_is_read_and_every_head_reads(name):
    for attention in attentions_of(FAMILIES[name]().to("meta")):
        inputs, output = find_projections(attention)
        owners = measure(attention, inputs, output, HEADS)
        assert owners.shape == (sum(p.outputs for p in inputs), HEADS)
        assert owners.any(1).all()
        readers = owners.sum(1)
        assert (readers == 1).sum() >= output.inputs
        assert set(readers.tolist()) <= {1, 2}


def test_interleaved_and_contiguous_layouts():
    one = torch.eye(HEADS, dtype=torch.bool)
    expected = {
        "gpt_neox": one.repeat_interleave(3 * 4, 0),
        "gpt2": one.repeat_interleave(4, 0).repeat(3, 1),
        "phi3": torch.cat(
            [
                one.repeat_interleave(4, 0),
                torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
                .bool()
                .repeat_interleave(4, 0)
                .repeat(2, 1),
            ]
        ),
    }
    for name, owners in expected.items():
        attention = attentions_of(FAMILIES[name]())[0]
        inputs, output = find_projections(attention)
        assert len(inputs) == 1
        assert torch.equal(measure(attention, inputs, output, HEADS), owners)


def test_training_mode_hooks_and_no_grad_make_no_difference():
    attention = attentions_of(FAMILIES["gpt2"]().train())[0]
    inputs, output = find_projections(attention)
    before = measure(attention, inputs, output, HEADS)
    output.module.register_forward_pre_hook(lambda *_: pytest.fail("the attention itself was run"))
    with torch.no_grad():
        assert torch.equal(measure(attention, inputs, output, HEADS), before)
    assert attention.training


def test_attention_that_needs_more_than_hidden_states():
    class Needy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)

        def forward(self, x, windows):
            return self.out(self.qkv(x)[..., :8] * len(windows))

    attention = Needy()
    inputs, output = find_projections(attention)
    with pytest.raises(UnmeasurableError, match="Needy cannot be run alone"):
        measure(attention, inputs, output, 2)
