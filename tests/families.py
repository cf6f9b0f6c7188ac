"""Small models with random weights, one of each architecture that the library has to handle.

`FAMILIES[name]()` builds a model, the same at every call; `model(**BATCHES[name]())` runs it.
Batches of transformers models hold labels, so that the output has a loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import peft
import torch
import transformers
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Builder = Callable[[], nn.Module]
Batch = dict[str, Tensor]

VOCABULARY = 40
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_SHAPE, "intermediate_size": 24, "vocab_size": VOCABULARY}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_POSITIONS = {"max_position_embeddings": 32}
_DECODER = {**_ENCODER, **_IDS, **_POSITIONS}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 6}
_VISION = {**_SHAPE, "intermediate_size": 24}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
_T5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 16,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + skip)


class ResNet(nn.Module):
    """ResNet with the module names of torchvision's, small."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        widths = (4, 4, 8, 8, 16)
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            first = BasicBlock(inputs, outputs, 1 if i == 1 else 2)
            setattr(self, f"layer{i}", nn.Sequential(first, BasicBlock(outputs, outputs, 1)))
        self.fc = nn.Linear(16, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(pixel_values)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def _transformers(model: str, config: dict[str, object]) -> nn.Module:
    cls = getattr(transformers, model)
    return cls(cls.config_class(**config))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


_BUILDERS: dict[str, Builder] = {
    name: partial(_transformers, model, config)
    for name, model, config in (
        ("bert", "BertForSequenceClassification", _ENCODER),
        ("roberta", "RobertaForSequenceClassification", {**_ENCODER, **_IDS}),
        (
            "distilbert",
            "DistilBertForSequenceClassification",
            {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": VOCABULARY},
        ),
        (
            "albert",
            "AlbertForSequenceClassification",
            {**_ENCODER, **_IDS, "num_hidden_layers": 3, "embedding_size": 8},
        ),
        (
            "deberta_v2",
            "DebertaV2ForSequenceClassification",
            {
                **_ENCODER,
                "relative_attention": True,
                "position_buckets": 4,
                "pos_att_type": ["p2c", "c2p"],
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "position_biased_input": False,
            },
        ),
        ("electra", "ElectraForSequenceClassification", {**_ENCODER, "embedding_size": 8}),
        (
            "t5",
            "T5ForConditionalGeneration",
            {**_T5, "vocab_size": VOCABULARY, "decoder_start_token_id": 0},
        ),
        (
            "bart",
            "BartForSequenceClassification",
            {**_BART, **_IDS, **_POSITIONS, "vocab_size": VOCABULARY, "num_labels": 2},
        ),
        ("gpt2", "GPT2LMHeadModel", {**_GPT2, **_IDS}),
        ("gpt2_untied", "GPT2LMHeadModel", {**_GPT2, **_IDS, "tie_word_embeddings": False}),
        ("gpt2_classifier", "GPT2ForSequenceClassification", {**_GPT2, **_IDS}),
        ("gpt_neox", "GPTNeoXForCausalLM", _DECODER),
        ("llama", "LlamaForCausalLM", _GROUPED),
        ("llama_tied", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
        ("llama_classifier", "LlamaForSequenceClassification", _GROUPED),
        ("qwen2", "Qwen2ForCausalLM", {**_DECODER, "num_key_value_heads": 2}),
        ("qwen3", "Qwen3ForCausalLM", _GROUPED),
        ("gemma", "GemmaForCausalLM", _GROUPED),
        ("gemma2", "Gemma2ForCausalLM", _GROUPED),
        ("gemma3", "Gemma3ForCausalLM", _GROUPED),
        ("phi3", "Phi3ForCausalLM", {**_DECODER, "num_key_value_heads": 2}),
        ("vit", "ViTForImageClassification", {**_VISION, "image_size": 8, "patch_size": 4}),
        (
            "swin",
            "SwinForImageClassification",
            {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
            | {"window_size": 4},
        ),
        (
            "convnext",
            "ConvNextForImageClassification",
            {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 2, 1], "image_size": 32},
        ),
    )
}
_BUILDERS |= {
    "efficientnet": partial(EfficientNet.from_name, "efficientnet-lite0", num_classes=3),
    "resnet": ResNet,
    "mlp": _mlp,
    "torch_encoder": _torch_encoder,
}


def _seeded(build: Builder) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


FAMILIES: dict[str, Builder] = {name: partial(_seeded, build) for name, build in _BUILDERS.items()}


def _tokens(classes: bool) -> Batch:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=random)
    ids[:, -1] = 2  # BART classifies at the end-of-sequence token
    labels = torch.tensor([0, 1]) if classes else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _floats(name: str, *shape: int, labels: bool = False) -> Batch:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {name: values} | ({"labels": torch.tensor([0, 1])} if labels else {})


_GENERATIVE = ("t5", "gpt2", "gpt2_untied", "gpt_neox", "llama", "llama_tied", "qwen2", "qwen3")
_GENERATIVE += ("gemma", "gemma2", "gemma3", "phi3")

BATCHES: dict[str, Callable[[], Batch]] = {
    name: partial(_tokens, name not in _GENERATIVE) for name in FAMILIES
} | {
    "vit": partial(_floats, "pixel_values", 2, 3, 8, 8, labels=True),
    "swin": partial(_floats, "pixel_values", 2, 3, 32, 32, labels=True),
    "convnext": partial(_floats, "pixel_values", 2, 3, 32, 32, labels=True),
    "efficientnet": partial(_floats, "inputs", 2, 3, 64, 64),
    "resnet": partial(_floats, "pixel_values", 2, 3, 16, 16),
    "mlp": partial(_floats, "input", 4, 6),
    "torch_encoder": partial(_floats, "src", 2, 5, 16),
}


def adaptable(model: nn.Module) -> list[str]:
    """Paths of the linear maps for LoRA: not a language model's head, not torch's own attention."""
    getter = getattr(model, "get_output_embeddings", lambda: None)
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not getter()
    ]


def with_lora(model: nn.Module, rank: int = 2) -> nn.Module:
    """The model with a LoRA pair at every linear map; no factor is zero."""
    config = peft.LoraConfig(r=rank, target_modules=adaptable(model), init_lora_weights=False)
    return adapted(model, config)


def adapted(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """The model with the adapter of a PEFT configuration, the same at every call."""
    with warnings.catch_warnings():
        # peft asks transformers by a name that is going out of use, and sets Conv1D's orientation
        warnings.simplefilter("ignore")
        return _seeded(partial(peft.get_peft_model, model, config))
