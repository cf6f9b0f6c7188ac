"""What methods add to a model: PEFT's own modules, exactly as their formulas say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from families import BATCHES, FAMILIES
from rgft import Config, InputError
from rgft.adapters.allocation import RankAllocation, check_allocation
from rgft.adapters.bottleneck import Bottleneck, add_bottlenecks, load_apart
from rgft.adapters.pairs import add_ia3
from rgft.models import locate
from rgft.spec import RunSpec
from rgft.structure.architecture import outline
from rgft.train import run
from runs import CutError, assert_same, cut_at_save, outcome, record_of
from tiny import bert, bert_loss, bert_with, mlp, tokens

PEFT = ("lora", "rslora", "dora", "adalora", "ia3")


@pytest.fixture
def spec(tiny_model: Path, tiny_data: Path) -> RunSpec:
    given = {"model": str(tiny_model), "data": str(tiny_data), "batch_size": 8, "evaluations": 3}
    return RunSpec(**given, epochs=1, lr=1e-2)  # type: ignore[arg-type]


def query(model: nn.Module) -> Any:
    """An adapted linear layer."""
    return model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")


def added(layer: Any, x: Tensor) -> Tensor:
    """What a layer puts out beyond the map it is beside."""
    return layer(x) - layer.base_layer(x)


def randomised(model: nn.Module) -> nn.Module:
    """Without the zeros that adapters begin with."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_l" in name:
                parameter.normal_()
    return model


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("adapter", "scale"), [("lora", 2.0), ("rslora", 16 / math.sqrt(4))])
def test_pairs_add_their_scaled_product(adapter: str, scale: float) -> None:
    layer = query(randomised(bert_with(adapter, size=4)))
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    assert a.shape == (4, 32)
    torch.testing.assert_close(added(layer, X), scale * X @ a.T @ b.T, rtol=1e-4, atol=1e-4)


def test_dora_learns_direction_and_magnitude_apart() -> None:
    layer = query(randomised(bert_with("dora")))
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    direction = layer.base_layer.weight + 2 * b @ a
    magnitude = layer.lora_magnitude_vector.default.weight
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(X), X @ weight.T + layer.base_layer.bias, rtol=1e-4, atol=1e-4)


def test_ia3_scales_keys_values_and_the_inner_activations() -> None:
    model = randomised(bert_with("ia3"))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1")
    value: Any = layer.get_submodule("attention.self.value")
    torch.testing.assert_close(value(X), value.base_layer(X) * value.ia3_l.default.flatten())
    inner: Any = layer.get_submodule("output.dense")
    x = torch.randn(5, 48)
    torch.testing.assert_close(inner(x), inner.base_layer(x * inner.ia3_l.default))
    assert type(layer.get_submodule("attention.self.query")) is nn.Linear


def test_ia3_in_an_unknown_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"where to put IA3's factors in a model of type 'Seq"):
        add_ia3(mlp(), 8)


@pytest.mark.parametrize("adapter", PEFT)
def test_the_model_begins_as_it_was_and_only_what_was_added_trains(adapter: str) -> None:
    plain, adapted, batch = bert(), bert_with(adapter), tokens()[0]
    torch.testing.assert_close(adapted(**batch).logits, plain(**batch).logits)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    own = ("lora_", "ia3_l", "modules_to_save")
    assert all(any(part in name for part in own) for name in trained)
    assert any("classifier" in name for name in trained)


# peft asks for a renamed attribute, and takes the ranks that it saved of AdaLoRA for those of LoRA
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The following rank_pattern keys")
@pytest.mark.parametrize("method", PEFT)
def test_the_saved_adapter_loads_with_peft(method: str, spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, method=method), tmp_path / "run")
    assert record["parameters"]["trainable"] < record["parameters"]["total"] / 2
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    base = AutoModelForSequenceClassification.from_pretrained(spec.model, num_labels=2)
    loaded: Any = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    batch = {"input_ids": torch.randint(5, 20, (6, 9), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        wanted = loaded(**batch).logits
        torch.testing.assert_close(merged(**batch).logits, wanted, rtol=1e-3, atol=1e-4)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**batch).logits, wanted, rtol=1e-2)


def allocated(model: nn.Module, allocation: RankAllocation, steps: int) -> Iterator[int]:
    """Train; the number of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step, batch in enumerate(tokens(steps), 1):
        bert_loss(model, batch).backward()
        optimizer.step()
        allocation.step()
        yield step
        optimizer.zero_grad()


def cubic(step: int, total: int, first: int, last: int) -> int:
    """How many ranks there are after a step (Zhang et al. 2023, equation 12)."""
    warm, final = int(0.15 * total), int(0.45 * total)
    if step <= warm:
        return first
    if step >= total - final:
        return last
    left = 1 - (step - warm) / (total - final - warm)
    return int(last + (first - last) * left**3)


def test_ranks_fall_by_the_cubic_schedule() -> None:
    model = bert_with("adalora", size=4)
    allocation = RankAllocation(model)
    allocation.begin(40)
    count = len(allocation.ranks)
    assert set(allocation.ranks.values()) == {6}
    held: list[int] = []
    for step in allocated(model, allocation, 40):
        held.append(sum(allocation.ranks.values()))
        assert held[-1] == cubic(step, 40, 6 * count, 4 * count)
    assert len(set(held)) > 5
    assert len(set(allocation.ranks.values())) > 1  # some modules keep more than others


def test_the_ranks_that_stay_are_the_most_important() -> None:
    """By smoothed sensitivity times smoothed uncertainty, of value and vectors together."""
    model = bert_with("adalora", size=4)
    allocation = RankAllocation(model)
    allocation.begin(20)
    pairs = {n: p for n, p in model.named_parameters() if "lora_" in n}
    mean = {n: torch.zeros_like(p) for n, p in pairs.items()}
    spread = {n: torch.zeros_like(p) for n, p in pairs.items()}
    optimizer = torch.optim.AdamW(pairs.values(), lr=1e-2)
    for batch in tokens(4):  # the fourth prunes for the first time
        bert_loss(model, batch).backward()
        optimizer.step()
        for n, p in pairs.items():
            sensitivity = (p.detach() * p.grad).abs()
            mean[n] = 0.85 * mean[n] + 0.15 * sensitivity
            spread[n] = 0.85 * spread[n] + 0.15 * (sensitivity - mean[n]).abs()
        allocation.step()
        optimizer.zero_grad()
    score = {n: mean[n] * spread[n] for n in pairs}
    importance = {}
    for name in (n for n in pairs if "lora_E" in n):
        left, right = name.replace("lora_E", "lora_B"), name.replace("lora_E", "lora_A")
        whole = score[name].flatten() + score[left].mean(0) + score[right].mean(1)
        importance |= {(name, rank): float(value) for rank, value in enumerate(whole)}
    budget = cubic(4, 20, 6 * len(allocation.ranks), 4 * len(allocation.ranks))
    wanted = set(sorted(importance, key=importance.__getitem__)[-budget:])
    live = {(n, i) for n, i in importance if float(pairs[n][i].detach()) != 0}
    assert live == wanted


def test_pruned_ranks_are_silent_at_the_end() -> None:
    model = bert_with("adalora", size=4)
    allocation = RankAllocation(model)
    allocation.begin(20)
    list(allocated(model, allocation, 20))
    live = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert live == list(allocation.ranks.values())
    assert sum(live) == 4 * len(live)


def test_too_short_a_run_has_no_room_for_an_allocation() -> None:
    with pytest.raises(InputError, match="the run has 1 steps, too few for AdaLoRA"):
        RankAllocation(bert_with("adalora")).begin(1)


@pytest.mark.parametrize(
    ("config", "budget", "said"),
    [
        (Config(policy="top"), None, "a policy that freezes nothing"),
        (Config(frozen_below=1), None, "without frozen_below"),
        (Config(), "auto", "does not know; give a share or a time"),
    ],
)
def test_what_ranks_cannot_be_allocated_under(
    config: Config, budget: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_allocation(config, budget)
    check_allocation(Config(), "0.3")


@pytest.mark.parametrize("budget", [None, "0.9"])
@pytest.mark.parametrize("checkpoint", [1, 3])
def test_an_allocation_resumes_to_the_same_bits(
    spec: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: str | None,
    checkpoint: int,
) -> None:
    """Before and after ranks are pruned; with a budget it is the clock."""
    given = replace(spec, method="adalora", budget=budget, epochs=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(given, whole)
    ranks = record_of(whole)["ranks"]
    assert sum(ranks.values()) == 8 * len(ranks)
    assert len(set(ranks.values())) > 1
    with monkeypatch.context() as patched, pytest.raises(CutError):
        cut_at_save(patched, checkpoint)
        run(given, cut)
    run(given, cut, resume=True)
    assert_same(whole, cut)


def test_an_allocation_saves_running_statistics_too() -> None:
    def normed() -> tuple[nn.Module, RankAllocation]:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        settings = {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["0", "2"]}
        model: nn.Module = get_peft_model(plain, AdaLoraConfig(**settings))
        return model, RankAllocation(model)

    (model, allocation), (resumed, other) = normed(), normed()
    model(torch.randn(8, 5))
    assert any(not torch.equal(b, resumed.get_buffer(n)) for n, b in model.named_buffers())
    other.load_state_dict(allocation.state_dict())
    for name, value in model.named_buffers():
        assert torch.equal(value, resumed.get_buffer(name)), name


def test_validation_loss_is_without_the_regulariser(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, method="adalora", balance=1.0), tmp_path / "run")
    assert record["metrics"]["validation"]["loss"] < 0.75
    assert record["train_loss"][0]["loss"] > 1  # with it, also where samples are weighted


def test_bottlenecks_stand_behind_feed_forward_parts() -> None:
    model = bert_with("bottleneck", size=8)
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, Bottleneck)}
    assert set(adapters) == {f"bert.encoder.layer.{i}.output.dense" for i in range(3)}
    layer = adapters["bert.encoder.layer.1.output.dense"]
    x = torch.randn(5, 48)
    h = layer.base_layer(x)
    inner = (h @ layer.down.weight.T + layer.down.bias).clamp_min(0)
    torch.testing.assert_close(layer(x), h + inner @ layer.up.weight.T + layer.up.bias)
    assert layer.down.weight.shape == (4, 32)
    assert (layer(x) - h).norm() < 1e-2 * h.norm()  # it begins near the identity
    assert layer.down.weight.abs().max() <= 0.02


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & {"gpt2", "llama", "t5", "vit", "bert"}))
def test_bottlenecks_are_found_in_other_families(family: str) -> None:
    model = FAMILIES[family]()
    layers = sum(part.module is not None for part in outline(model))
    add_bottlenecks(model, 4)
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == layers
    out = model(**BATCHES[family]())
    assert any(t.requires_grad for t in out.values() if isinstance(t, Tensor))


def test_a_model_without_layers_has_no_place_for_bottlenecks() -> None:
    with pytest.raises(InputError, match="adapters"):
        add_bottlenecks(nn.Linear(2, 2), 4)


def test_a_run_with_bottlenecks_is_saved_and_loaded(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, method="adapters", settings={"reduction": 8}), tmp_path / "run")
    loaded = load_apart(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    text = (Path(spec.data or "") / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    names = {"bad": 0, "good": 1}
    with torch.no_grad():
        answer = loaded(**batch, labels=torch.tensor([names[row["label"]] for row in rows]))
    assert answer.loss.item() == pytest.approx(record["metrics"]["test"]["loss"], rel=1e-4)
    with pytest.raises(InputError, match="which from_pretrained cannot load"):
        run(replace(spec, model=str(tmp_path / "run")), tmp_path / "next")
    with pytest.raises(InputError, match="holds no model with bottleneck adapters"):
        load_apart(tmp_path)


def test_adapters_of_another_kind_are_not_taken_for_bottlenecks(tmp_path: Path) -> None:
    model: Any = bert_with("lora")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="holds no model with bottleneck adapters"):
        load_apart(tmp_path)


def test_a_folder_named_base_beside_a_model_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="which from_pretrained cannot load"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == str(tmp_path)


def test_bottlenecks_resume_to_the_same_bits(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(spec, method="adapters", budget="0.9")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(given, whole)
    with monkeypatch.context() as patched, pytest.raises(CutError):
        cut_at_save(patched, 1)
        run(given, cut)
    run(given, cut, resume=True)
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, cut))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert outcome(whole) == outcome(cut)
