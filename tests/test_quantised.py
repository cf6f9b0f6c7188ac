"""LoRA over a frozen base in few bits, against the same over a base that was unpacked before."""

from __future__ import annotations

import io
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import loops
import test_trl
import test_trl_features
from flops import counted_flops
from loops import LOOPS
from rgft import Config, FlopMeter, Guide, Policy, find_method
from rgft.adapters import ADAPTERS
from rgft.costs import CostModel
from rgft.execution.prefix_cache import PrefixCache
from rgft.integrations.transformers import RGFTCallback
from test_integrations import OTHERS
from test_integrations import pytestmark as of_loops
from tiny import bert, bert_loss, fit, same_state, tokens

KINDS = {
    "bitsandbytes-8bit": "bitsandbytes",
    "bitsandbytes-nf4": "bitsandbytes",
    "bitsandbytes-nf4-double": "bitsandbytes",
    "torchao-int8": "torchao",
}
# bitsandbytes packs in blocks of 64
SHAPE: dict[str, Any] = {"layers": 2, "hidden_size": 64, "intermediate_size": 64}
TOP = Config(granularity="lora", policy="top", top=0.4, every=2)
# 8-bit products quantise activations, too; the others unpack the weights, and multiply in float32
NEAR = {kind: 5e-2 if kind == "bitsandbytes-8bit" else 1e-4 for kind in KINDS}

pytestmark = [
    # peft asks transformers by a name that goes out of use
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*will be cast from torch.float32 to float16"),
    *of_loops,
]


def setting(kind: str, head: str = "classifier") -> Any:
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - optional
        from transformers import TorchAoConfig  # noqa: PLC0415

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[head])
    if kind == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[head])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind.endswith("double"),
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[head],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    bert(**SHAPE).save_pretrained(path)  # type: ignore[operator]
    return path


def base(kind: str, folder: Path) -> Any:
    """As transformers loads it."""
    if find_spec(KINDS[kind]) is None:
        pytest.skip(f"{KINDS[kind]} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages', about each other
        return AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=setting(kind), device_map="cpu", dtype=torch.float32
        )


def unpacked(layer: nn.Module) -> Tensor:
    """By the packages' own functions."""
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - optional

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize()


def twin(quantised: nn.Module) -> Any:
    """A model with plain numbers for the same weights."""
    model = bert(**SHAPE)
    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if isinstance(layer, nn.Linear):
                plain: Any = model.get_submodule(name)
                packed = name != "classifier"
                plain.weight.copy_(unpacked(layer) if packed else layer.weight)
                plain.bias.copy_(layer.bias)
    return model


def with_pairs(model: nn.Module) -> Any:
    """As rgft-lora makes it; B is not 0, so that all pairs have a gradient at once."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        adapted = ADAPTERS["lora"].add(model, 4).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return adapted


def guided(model: nn.Module, config: Config, **given: Any) -> tuple[Any, Guide]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    return optimizer, Guide(model, optimizer, config, **given)


def trained(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return {name: value.detach().clone() for name, value in state.items()}


def floating(model: nn.Module) -> dict[str, Tensor]:
    """What is not packed."""
    plain = (torch.Tensor, nn.Parameter)
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if type(p) in plain and type(p.data) in plain}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_plans_and_weights_are_those_over_unpacked_weights(kind: str, folder: Path) -> None:
    packed = base(kind, folder)
    dense = twin(packed)
    models = [with_pairs(packed), with_pairs(dense)]
    guides = []
    config = find_method("rgft-lora").config
    for model in models:
        optimizer, guide = guided(model, Config(granularity=config.granularity, every=2))
        list(fit(model, optimizer, tokens(5), bert_loss))
        guide.close()
        guides.append(guide)
    scores, wanted = (guide.error_map.values for guide in guides)
    assert len(scores) > 12
    torch.testing.assert_close(scores, wanted, rtol=NEAR[kind], atol=0)
    ours, theirs = (guide.plan.lr_scale for guide in guides)
    assert ours == pytest.approx(theirs, rel=NEAR[kind])
    assert max(ours) == 2
    for name, value in trained(models[1]).items():
        torch.testing.assert_close(trained(models[0])[name], value, rtol=0, atol=5 * NEAR[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_freezing_keeps_bits_and_stops_backward(kind: str, folder: Path) -> None:
    def upper(situation: Any) -> Tensor:
        depths = torch.tensor([c.depth for c in situation.components])
        return (depths > 1).double()

    model = with_pairs(base(kind, folder))
    config = Config(granularity="lora", policy=Policy(upper, False, freezes=True), every=2)
    optimizer, guide = guided(model, config)
    seen: list[bool] = []
    layer = model.base_model.model.bert.encoder.layer[0]
    layer.register_forward_hook(lambda m, i, output: seen.append(output.requires_grad))
    before = floating(model)
    list(fit(model, optimizer, tokens(6), bert_loss))
    guide.close()
    moved = {name for name, p in floating(model).items() if not torch.equal(p, before[name])}
    assert moved
    assert all("layer.1." in name or "pooler" in name or "classifier" in name for name in moved)
    assert len(seen) == 6
    assert not any(seen[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_unpacked_weights(kind: str, folder: Path) -> None:
    """PyTorch's own counter sees them in the model that has plain numbers."""
    packed = base(kind, folder)
    reference, dense = CostModel(packed), twin(packed)
    full = sum(counted_flops(twin(packed), tokens()[0]))
    model, plain = with_pairs(packed), with_pairs(dense)
    meter = FlopMeter(model, reference)
    for upper in (False, True):
        for one in (model, plain):
            for name, parameter in one.named_parameters():
                if upper and "layer.0." in name:
                    parameter.requires_grad_(False)
        spent = meter.spent
        bert_loss(model, tokens()[0]).backward()
        assert meter.spent - spent == pytest.approx(
            sum(counted_flops(plain, tokens()[0])), rel=0.01
        )
    assert meter.full / 2 == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run(kind: str, folder: Path) -> None:
    """What is saved is what trains: the base is loaded anew."""
    steps = tokens(7)
    ends = []
    for stop in (7, 3):
        model = with_pairs(base(kind, folder))
        optimizer, guide = guided(model, TOP)
        list(fit(model, optimizer, steps[:stop], bert_loss))
        if stop < 7:
            file = io.BytesIO()
            torch.save([trained(model), optimizer.state_dict(), guide.state_dict()], file)
            file.seek(0)
            pairs, state, ours = torch.load(file, weights_only=True)
            model = with_pairs(base(kind, folder))
            set_peft_model_state_dict(model, pairs)
            optimizer, guide = guided(model, TOP)
            optimizer.load_state_dict(state)
            guide.load_state_dict(ours)
            list(fit(model, optimizer, steps[stop:], bert_loss))
        guide.close()
        ends.append((trained(model), guide.plan.lr_scale))
    assert 0.0 in ends[0][1]
    assert same_state(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_ends_with_its_budget(kind: str, folder: Path, tmp_path: Path) -> None:
    callback = RGFTCallback(TOP, budget=0.5)
    rows = [{k: v[i] for k, v in batch.items()} for batch in tokens(20) for i in range(4)]
    model = with_pairs(base(kind, folder))
    before = floating(model)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    after = floating(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name or "classifier" in name for name in moved)
    spending = callback.guide.spending
    assert spending is not None
    assert spending.meter.spent / (20 * spending.meter.full / spending.meter.batches) == (
        pytest.approx(0.5, abs=0.04)
    )


@pytest.mark.parametrize("kind", ["bitsandbytes-8bit", "torchao-int8"])
def test_prefix_cache(kind: str, folder: Path) -> None:
    ends = []
    for cached in (True, False):
        model = with_pairs(base(kind, folder))
        config = Config(granularity="lora", policy="normalized-max", every=2, frozen_below=2)
        optimizer, guide = guided(model, config)
        with PrefixCache(model) as cache:
            for _ in range(3):
                for number, batch in enumerate(tokens(2)):
                    if cached:
                        cache.follow(guide.lowest)
                        batch["sample_ids"] = torch.arange(4) + 4 * number
                    else:
                        model.base_model.model.bert.encoder.layer[0].eval()
                    list(fit(model, optimizer, [batch], bert_loss))
        assert cache.counts["hits"] == 16 * cached
        guide.close()
        ends.append(trained(model))
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_every_loop_does_what_a_plain_one_does(
    name: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        return with_pairs(base(kind, folder))

    monkeypatch.setattr(loops, "CONFIG", TOP)
    ours, theirs = LOOPS[name](tmp_path, make=make), loops.plain(tmp_path, make=make)
    assert torch.equal(ours.plans, theirs.plans)
    assert (ours.plans == 0).any()
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-7)
    for weight, value in ours.weights.items():
        if "lora_" in weight:
            torch.testing.assert_close(value, theirs.weights[weight], rtol=0, atol=1e-6)


def quantised_llama(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"vocab_size": len(test_trl.WORDS), "pad_token_id": 0, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape | heads | ids)).save_pretrained(folder / "packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LlamaForCausalLM.from_pretrained(
            folder / "packed",
            quantization_config=setting(kind, "lm_head"),
            device_map="cpu",
            dtype=torch.float32,
        )


@pytest.mark.filterwarnings("ignore")  # of the packages', about each other
@pytest.mark.parametrize("kind", ["torchao-int8"])
@pytest.mark.parametrize("name", ["sft-lora", "dpo-lora", "sentences-lora"])
def test_trl_does_what_is_frozen_by_hand(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(KINDS[kind]) is None:
        pytest.skip(f"{KINDS[kind]} is not installed")
    packed = {"quantization_config": setting(kind), "device_map": "cpu"}
    encoder = partial(test_trl.Transformer, model_kwargs=packed)
    monkeypatch.setattr(test_trl, "Transformer", encoder)
    monkeypatch.setattr(test_trl, "bert", lambda: bert(**SHAPE | {"layers": 3}))
    monkeypatch.setattr(test_trl, "llama", lambda folder: quantised_llama(kind, folder))
    test_trl_features.check(name, "freezing", tmp_path)
