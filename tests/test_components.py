"""Partitions of every family at every granularity hold each parameter element once."""

from __future__ import annotations

import time

import pytest
import torch
import transformers
from torch import nn

from families import FAMILIES, adaptable, with_lora
from partition_checks import check_partition
from rgft.components import ParameterSlice, partition
from rgft.errors import InputError

NO_ATTENTION = {"convnext", "efficientnet", "resnet", "mlp"}
STRUCTURAL = ("layer", "block", "head")


def shape_of(parameter_name: str, parameter: nn.Parameter) -> str:
    return f"{parameter.ndim}-dimensional {'weight' in parameter_name}"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", [*STRUCTURAL, "parameter", r"(weight|bias)$", shape_of])
def test_each_element_is_in_one_component(name, granularity):
    model = FAMILIES[name]()
    if granularity in ("block", "head") and name in NO_ATTENTION:
        with pytest.raises(InputError, match=r"none of its layers has an attention.*is 'layer'"):
            partition(model, granularity)
    else:
        check_partition(model, partition(model, granularity))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", [*STRUCTURAL, "lora", "parameter", r"lora_[AB]", shape_of])
def test_each_element_of_a_model_with_lora_is_in_one_component(name, granularity):
    model = with_lora(FAMILIES[name]())
    if granularity in ("block", "head") and name in NO_ATTENTION:
        with pytest.raises(InputError, match="is 'layer'"):
            partition(model, granularity)
        return
    components = partition(model, granularity)
    check_partition(model, components)
    if granularity in STRUCTURAL:  # names do not depend on the wrapper
        plain = {(c.name, c.depth) for c in partition(FAMILIES[name](), granularity)}
        added = [c for c in components if (c.name, c.depth) not in plain]
        assert len(components) == len(plain) + len(added)
        # the factors that all heads share are what is left of an attention without biases
        assert all(c.kind == "attention" and granularity == "head" for c in added)
        assert all("lora_" in s.parameter for c in added for s in c.slices)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_pairs(name):
    plain = FAMILIES[name]()
    layers = [c for c in partition(plain, "layer") if c.kind == "layer"]
    components = partition(with_lora(FAMILIES[name]()), "lora")
    pairs = {c.name: c for c in components if c.kind == "lora"}
    assert set(pairs) == {f"{path}.lora.default" for path in adaptable(plain)}
    for path, pair in pairs.items():
        factors = sorted(s.parameter.rpartition(".lora_")[2] for s in pair.slices)
        assert factors == ["A.default.weight", "B.default.weight"]
        around = [layer.depth for layer in layers if path.startswith(f"{layer.name}.")]
        assert around in ([], [pair.depth])
    rest = {(c.name, c.numel) for c in components if c.kind != "lora"}
    assert rest == {(c.name, c.numel) for c in partition(plain, "layer")}


def test_each_adapter_has_its_own_pairs():
    model = with_lora(FAMILIES["bert"]())
    model.add_adapter("second", model.peft_config["default"])
    components = partition(model, "lora")
    check_partition(model, components)
    names = {c.name for c in components if c.kind == "lora"}
    query = "bert.encoder.layer.1.attention.self.query.lora"
    assert {f"{query}.default", f"{query}.second"} <= names


def test_slices_are_views():
    tensor = torch.arange(12).reshape(3, 4)
    assert ParameterSlice("w").of(tensor) is tensor
    part = ParameterSlice("w", 1, 1, 3).of(tensor)
    assert part.tolist() == [[1, 2], [5, 6], [9, 10]]
    assert part.data_ptr() == tensor[:, 1:].data_ptr()


@pytest.mark.parametrize("granularity", ["layer", "block", "head", "parameter"])
def test_large_models_take_less_than_two_seconds(granularity):
    config = transformers.LlamaConfig(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    start = time.perf_counter()
    components = partition(model, granularity)
    assert time.perf_counter() - start < 2
    assert sum(c.numel for c in components) == sum(p.numel() for p in model.parameters())
    assert sum(c.kind == "attention_head" for c in components) == 1024 * (granularity == "head")


def test_partition_leaves_model_and_random_state_alone():
    model = FAMILIES["phi3"]().train()
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        partition(model, "head")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not calls
    assert all(module.training and len(module._forward_hooks) == 1 for module in model.modules())
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters()
    )
