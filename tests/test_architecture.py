"""The outline of each family: names, kinds and depths."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
import transformers
from torch import nn

from families import FAMILIES, adapted
from partition_checks import check_partition
from rgft.components import partition


def outline_of(model: nn.Module, granularity: str = "layer") -> list[str]:
    return [f"{c.depth} {c.kind} {c.name}" for c in partition(model, granularity)]


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 24, "vocab_size": 40}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24, "vocab_size": 40}
SOUND = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
LAYERS = {
    "bert": [
        "0 embedding embeddings",
        "1 layer bert.encoder.layer.0",
        "2 layer bert.encoder.layer.1",
        "3 other pooler",
        "4 head classifier",
    ],
    "distilbert": [
        "0 embedding embeddings",
        "1 layer distilbert.transformer.layer.0",
        "2 layer distilbert.transformer.layer.1",
        "3 head pre_classifier",
        "3 head classifier",
    ],
    "albert": [
        "0 embedding embeddings",
        "1 layer albert.encoder.albert_layer_groups.0.albert_layers.0",
        "2 other pooler",
        "3 head classifier",
    ],
    "deberta_v2": [
        "0 embedding embeddings",
        "1 layer deberta.encoder.layer.0",
        "2 layer deberta.encoder.layer.1",
        "3 head pooler",
        "3 head classifier",
    ],
    "t5": [
        "0 embedding embeddings",
        "1 layer encoder.block.0",
        "2 layer encoder.block.1",
        "2 norm encoder.final_layer_norm",
        "3 layer decoder.block.0",
        "4 layer decoder.block.1",
        "5 norm decoder.final_layer_norm",
    ],
    "bart": [
        "0 embedding embeddings",
        "1 layer model.encoder.layers.0",
        "2 layer model.encoder.layers.1",
        "3 layer model.decoder.layers.0",
        "4 layer model.decoder.layers.1",
        "5 head classification_head",
    ],
    "gpt2": [
        "0 embedding embeddings",
        "1 layer transformer.h.0",
        "2 layer transformer.h.1",
        "3 norm ln_f",
    ],
    "gpt2_untied": [
        "0 embedding embeddings",
        "1 layer transformer.h.0",
        "2 layer transformer.h.1",
        "3 norm ln_f",
        "4 lm_head lm_head",
    ],
    "llama_classifier": [
        "0 embedding embeddings",
        "1 layer model.layers.0",
        "2 layer model.layers.1",
        "3 norm norm",
        "4 head score",
    ],
    "swin": [
        "0 embedding embeddings",
        "1 layer swin.encoder.layers.0.blocks.0",
        "2 layer swin.encoder.layers.0.blocks.1",
        "2 other swin.encoder.layers.0.downsample",
        "3 layer swin.encoder.layers.1.blocks.0",
        "4 layer swin.encoder.layers.1.blocks.1",
        "5 norm layernorm",
        "6 head classifier",
    ],
    "resnet": [
        "0 embedding stem",
        *(f"{i + 1} layer layer{i // 2 + 1}.{i % 2}" for i in range(8)),
        "9 head fc",
    ],
    "efficientnet": [
        "0 embedding stem",
        *(f"{i + 1} layer _blocks.{i}" for i in range(16)),
        "17 other _conv_head",
        "17 norm _bn1",
        "18 head _fc",
    ],
    "mlp": ["1 layer 0", "2 layer 2", "3 head 4"],
    "torch_encoder": ["1 layer layers.0", "2 layer layers.1"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    assert outline_of(FAMILIES[name]()) == LAYERS[name]


@pytest.mark.parametrize(
    ("model", "config", "layers"),
    [
        ("XLNetForSequenceClassification", XLNET, "transformer.layer"),
        ("MPNetForSequenceClassification", SIZES, "mpnet.encoder.layer"),
        ("Wav2Vec2ForSequenceClassification", SIZES | SOUND, "wav2vec2.encoder.layers"),
    ],
)
def test_layers_that_transformers_does_not_mark_or_marks_beside_others(model, config, layers):
    """XLNet and MPNet mark none; Wav2Vec2 marks convolutions, too."""
    cls = getattr(transformers, model)
    components = partition(cls(cls.config_class(**config)), "layer")
    assert [c.name for c in components if c.kind == "layer"] == [f"{layers}.0", f"{layers}.1"]


def test_blocks_of_a_decoder_with_cross_attention():
    for name, layer in (("t5", "decoder.block.1"), ("bart", "model.decoder.layers.1")):
        found = [line for line in outline_of(FAMILIES[name](), "block") if f" {layer}" in line]
        assert found == [
            f"4 attention {layer}.attention",
            f"4 attention {layer}.cross_attention",
            f"4 feed_forward {layer}.feed_forward",
            f"4 norm {layer}.norm",
        ]


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "qwen3", "swin", "torch_encoder"])
def test_block_norms_are_exactly_the_norms_of_the_layer(name):
    model = FAMILIES[name]()
    components = partition(model, "block")
    norms = {s.parameter for c in components if c.kind == "norm" for s in c.slices}
    inside = {s.parameter for c in components if c.depth > 0 for s in c.slices}
    assert norms == {name for name in inside if "norm" in name.lower() or "ln_" in name} - {
        s.parameter for c in components if c.kind == "other" for s in c.slices
    }


def test_what_is_left_of_an_attention_is_its_output_bias():
    components = {c.name: c for c in partition(FAMILIES["bert"](), "head")}
    rest = components["bert.encoder.layer.0.attention"]
    assert [s.parameter for s in rest.slices] == [
        "bert.encoder.layer.0.attention.output.dense.bias"
    ]
    assert rest.kind == "attention"


def test_tied_embeddings_count_once_and_lie_lowest():
    model = FAMILIES["llama_tied"]()
    components = partition(model, "layer")
    assert not [c for c in components if c.kind == "lm_head"]
    assert components[0].numel == model.lm_head.weight.numel()


def test_a_tied_weight_lies_at_its_lowest_depth_whatever_is_registered_first():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 9, bias=False)
            self.embedding = nn.Embedding(9, 4)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 4) for _ in range(2))
            self.embedding.weight = self.last.weight
            self.blocks[1].linear1 = self.blocks[0].linear1

    model = Tied()
    components = partition(model, "block")
    check_partition(model, components)
    assert [c.slices[0].parameter for c in components if c.depth == 0] == ["last.weight"]
    shared = next(c for c in components if c.name == "blocks.0.feed_forward")
    assert "blocks.0.linear1.weight" in {s.parameter for s in shared.slices}


@pytest.mark.parametrize("granularity", ["layer", "block", "head"])
def test_wrapped_and_weightless_models_split_alike(granularity):
    expected = outline_of(FAMILIES["gpt_neox"](), granularity)
    for wrap in (partial(torch.compile, backend="eager"), nn.DataParallel):
        wrapped = wrap(FAMILIES["gpt_neox"]())
        assert outline_of(wrapped, granularity) == expected
        check_partition(wrapped, partition(wrapped, granularity))
    assert outline_of(FAMILIES["gpt_neox"]().to("meta"), granularity) == expected


def test_soft_prompt_is_a_component():
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=16
    )
    model = adapted(FAMILIES["gpt2"](), config)
    components = partition(model, "layer")
    check_partition(model, components)
    assert ("prompt_encoder", "other", 0, 48) in [
        (c.name, c.kind, c.depth, c.numel) for c in components
    ]


def test_base_model_has_no_head():
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.BertModel(transformers.BertConfig(**shape, intermediate_size=8))
    assert outline_of(model) == [
        "0 embedding embeddings",
        "1 layer encoder.layer.0",
        "2 other pooler",
    ]


def test_head_of_a_classifier_trained_beside_lora_is_a_head():
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    model = adapted(FAMILIES["bert"](), config)
    head = next(c for c in partition(model, "lora") if c.kind == "head")
    assert head.name == "classifier"
    assert any("modules_to_save" in s.parameter for s in head.slices)
