"""Head slices are what each head really reads and writes, found out by zeroing them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from families import BATCHES, FAMILIES, with_lora
from partition_checks import check_partition
from rgft.components import Component, partition
from rgft.errors import InputError

# the modules that mix the heads of each family, written down independently of the library
OUTPUTS = {
    "bert": r"attention\.output\.dense",
    "roberta": r"attention\.output\.dense",
    "electra": r"attention\.output\.dense",
    "deberta_v2": r"attention\.output\.dense",
    "distilbert": r"attention\.out_lin",
    "albert": r"attention\.dense",
    "t5": r"Attention\.o",
    "bart": r"attn\.out_proj",
    "gpt2": r"attn\.c_proj",
    "gpt_neox": r"attention\.dense",
    "llama": r"self_attn\.o_proj",
    "qwen2": r"self_attn\.o_proj",
    "qwen3": r"self_attn\.o_proj",
    "gemma": r"self_attn\.o_proj",
    "gemma2": r"self_attn\.o_proj",
    "gemma3": r"self_attn\.o_proj",
    "phi3": r"self_attn\.o_proj",
    "vit": r"attention\.o_proj",
    "swin": r"attention\.o_proj",
}


@contextmanager
def zeroed(tensors: list[Tensor]) -> Iterator[None]:
    """The tensors hold zeros inside the block."""
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
        yield
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)


def randomised(model: nn.Module) -> nn.Module:
    """The model with weights large enough that attention is far from uniform, and with biases."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.2)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, batch: dict[str, Tensor], module: nn.Module) -> tuple[Tensor, Tensor]:
    """Input and output of a module at its first call while the model runs."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    model(**batch)
    hook.remove()
    return calls[0]


def changed_chunks(before: Tensor, after: Tensor, heads: int) -> set[int]:
    """The heads whose chunk of the last dimension differs."""
    chunks = (before != after).unflatten(-1, (heads, -1)).transpose(-2, -1).flatten(0, -2).any(0)
    return set(chunks.nonzero().flatten().tolist())


def check_heads(model: nn.Module, batch: dict[str, Tensor], outputs: str) -> None:
    """Zeroing the slices of a head changes what that head contributes, and nothing else."""
    model = randomised(model)
    parameters = dict(model.named_parameters())
    components = partition(model, "head")
    found = 0
    for path, module in model.named_modules():
        if not re.search(rf"{outputs}$", path):
            continue
        found += 1
        heads, kv_heads = heads_of(components, path)
        hidden, mixed = run(model, batch, module)
        size = hidden.shape[-1] // len(heads)
        groups = len(heads) // max(1, len(kv_heads))
        for number, head in enumerate(heads):
            rows = [s for s in head.slices if not s.parameter.startswith(f"{path}.")]
            columns = [s for s in head.slices if s.parameter.startswith(f"{path}.")]
            own = slice(number * size, (number + 1) * size)
            with zeroed([s.of(parameters[s.parameter]) for s in rows]):
                after = run(model, batch, module)[0]
            assert changed_chunks(hidden, after, len(heads)) == {number}
            assert kv_heads or not after[..., own].any()  # no values, not even by a bias
            with zeroed([s.of(parameters[s.parameter]) for s in columns]):
                lost = mixed - run(model, batch, module)[1]
            expected = hidden[..., own] @ matrix(module)[own]
            torch.testing.assert_close(lost, expected, rtol=1e-4, atol=1e-5)
            assert expected.abs().max() > 1e-3
        for number, head in enumerate(kv_heads):
            readers = set(range(number * groups, (number + 1) * groups))
            with zeroed([s.of(parameters[s.parameter]) for s in head.slices]):
                after = run(model, batch, module)[0]
            assert changed_chunks(hidden, after, len(heads)) == readers
            assert not after[..., min(readers) * size : (max(readers) + 1) * size].any()
    assert found


def heads_of(components: list[Component], output: str) -> tuple[list[Component], list[Component]]:
    """Query and key-value heads of the attention with that output projection."""
    owners = [
        c
        for c in components
        if c.kind == "attention_head" and any(s.parameter.startswith(output) for s in c.slices)
    ]
    attention = owners[0].name.removesuffix(".head.0")
    assert [c.name for c in owners] == [f"{attention}.head.{i}" for i in range(len(owners))]
    shared = [c for c in components if c.name.startswith(f"{attention}.kv_head.")]
    assert [c.name for c in shared] == [f"{attention}.kv_head.{i}" for i in range(len(shared))]
    assert all(c.kind == "kv_head" for c in shared)
    return owners, shared


@torch.no_grad()
def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map as [inputs, outputs], LoRA included."""
    base = getattr(module, "base_layer", module)
    weight = base.weight.T if isinstance(base, nn.Linear) else base.weight
    for adapter, scale in getattr(module, "scaling", {}).items():
        weight = weight + scale * (module.lora_B[adapter].weight @ module.lora_A[adapter].weight).T
    return weight


@pytest.mark.parametrize("name", OUTPUTS)
def test_heads_own_what_they_read(name):
    check_heads(FAMILIES[name](), BATCHES[name](), OUTPUTS[name])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
def test_heads_own_their_part_of_lora(name):
    model = with_lora(FAMILIES[name]())
    factors = [s for c in partition(model, "head") for s in c.slices if "lora_B" in s.parameter]
    assert any(s.dim == 0 for s in factors)
    check_heads(model, BATCHES[name](), OUTPUTS[name])


def test_heads_of_torch_attention():
    """Torch's attention never calls its output projection, so that is made the identity."""
    model = randomised(FAMILIES["torch_encoder"]())
    parameters = dict(model.named_parameters())
    batch = BATCHES["torch_encoder"]()
    for i, layer in enumerate(model.layers):
        with torch.no_grad():
            layer.self_attn.out_proj.weight.copy_(torch.eye(16))
        heads, shared = heads_of(partition(model, "head"), f"layers.{i}.self_attn.out_proj")
        assert len(heads) == 4
        assert not shared
        before = run(model, batch, layer.self_attn)[1][0]
        for number, head in enumerate(heads):
            for part in ("in_proj", "out_proj"):
                pieces = [s for s in head.slices if part in s.parameter]
                with zeroed([s.of(parameters[s.parameter]) for s in pieces]):
                    after = run(model, batch, layer.self_attn)[1][0]
                assert changed_chunks(before, after, 4) == {number}


def test_torch_attention_with_keys_of_another_width():
    layer = nn.TransformerDecoderLayer(8, 2, 12)
    layer.multihead_attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    model = nn.TransformerDecoder(layer, 2)
    components = partition(model, "head")
    check_partition(model, components)
    head = next(c for c in components if c.name == "layers.1.multihead_attn.head.1")
    found = {
        (s.parameter.rpartition(".multihead_attn.")[2], s.dim, s.start, s.stop) for s in head.slices
    }
    assert {("k_proj_weight", 0, 4, 8), ("out_proj.weight", 1, 4, 8)} <= found
    assert {("in_proj_bias", 0, at, at + 4) for at in (4, 12, 20)} <= found


# -- other layouts and sizes -----------------------------------------------------------------

TOKENS = {"input_ids": torch.tensor([[3, 7, 5, 11, 2], [9, 4, 8, 6, 3]])}
GPT_BIG_CODE = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 16}


def built(model: str, **config: object) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, model)
    return cls(cls.config_class(**config))


@pytest.mark.parametrize("one_key_head", [True, False])
def test_the_same_fused_name_with_two_layouts(one_key_head):
    model = built("GPTBigCodeForCausalLM", **GPT_BIG_CODE, multi_query=one_key_head)
    check_heads(model, TOKENS, r"attn\.c_proj")
    kinds = [c.kind for c in partition(model, "head")]
    assert kinds.count("kv_head") == 2 * one_key_head


def test_norms_over_all_heads_do_not_hide_them():
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
    model = built("Olmo2ForCausalLM", **shape, num_attention_heads=4, pad_token_id=0)
    components = partition(model, "head")
    check_partition(model, components)
    assert sum(c.kind == "attention_head" for c in components) == 4


SMALL = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
SMALL |= {"num_attention_heads": 4, "pad_token_id": 0}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2}


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        ("DeepseekV2ForCausalLM", SMALL | LATENT | {"v_head_dim": 4}, "are not q, k, v"),
        ("DiffLlamaForCausalLM", SMALL, "do not keep heads one after the other"),
        (
            "CodeGenForCausalLM",
            {"n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 2, "vocab_size": 16},
            "CodeGenAttention cannot be run alone, so the layout of qkv_proj is open",
        ),
    ],
)
def test_layouts_that_are_not_certain_are_refused(model, config, reason):
    network = built(model, **config)
    with pytest.raises(InputError, match=f"{reason}.*finest.*is 'block'"):
        partition(network, "head")
    check_partition(network, partition(network, "block"))


sizes = st.integers(1, 3)
halves = st.integers(1, 3).map(lambda n: 2 * n)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["bert", "gpt2", "gpt_neox", "llama", "phi3"]),
    layers=sizes,
    kv_heads=sizes,
    groups=sizes,
    head_dim=halves,
)
def test_heads_at_any_size(family, layers, kv_heads, groups, head_dim):
    grouped = family in ("llama", "phi3")
    heads = kv_heads * groups if grouped else kv_heads
    width = heads * head_dim if family != "llama" else 10
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"vocab_size": 16, "intermediate_size": 6, "pad_token_id": 0, "eos_token_id": 2}
    shape |= {"num_key_value_heads": kv_heads} if grouped else {}
    shape |= {"head_dim": head_dim} if family == "llama" else {}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if grouped else {}
    shape |= {"bos_token_id": 1}
    if family == "gpt2":
        shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 16}
        shape |= {"bos_token_id": 1, "eos_token_id": 2}
    model = built(type(FAMILIES[family]()).__name__, **shape)
    check_partition(model, partition(model, "head"))
    check_heads(model, TOKENS, OUTPUTS[family])
