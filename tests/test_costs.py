"""Predicted FLOPs against those that PyTorch's counter sees."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import BATCHES, FAMILIES, with_lora
from flops import counted_flops
from rgft import Config, CostModel, FlopMeter, Guide
from rgft.costs import tracing
from rgft.costs.shapes import call
from rgft.structure.dropout import turn_off_dropout
from tiny import bert, bert_loss, checkpoint_activations, fit, tokens

COUNTED = (
    "bert",
    "bart",
    "deberta_v2",
    "gpt2",
    "llama",
    "llama_classifier",
    "vit",
    "t5",
    "resnet",
    "mlp",
)
COUNTED += ("roberta", "qwen2", "albert", "gpt_neox", "phi3", "torch_encoder")


def train_only(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def subsets(model: nn.Module, count: int) -> list[set[str]]:
    """All, none, and random sets of a random size."""
    draw = random.Random(0)
    names = [name for name, _ in model.named_parameters()]
    drawn = [set(draw.sample(names, draw.randint(1, len(names)))) for _ in range(count)]
    single = [{draw.choice(names)} for _ in range(count)]
    return [set(names), set(), *drawn, *single]


def agree(model: nn.Module, batch: dict[str, Tensor], sets: list[set[str]]) -> None:
    model.train()
    graph = CostModel(model).graph(**batch)
    for names in sets:
        train_only(model, names)
        model.zero_grad(set_to_none=True)
        cost = graph.cost(names)
        assert (cost.forward, cost.backward) == counted_flops(model, batch), names
        assert cost.total == cost.forward + cost.backward


@pytest.mark.parametrize("family", COUNTED)
def test_any_set_of_trained_parameters_costs_what_is_counted(family: str) -> None:
    model = FAMILIES[family]()
    agree(model, BATCHES[family](), subsets(model, 5))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2_classifier"])
def test_lora_costs_what_is_counted(family: str) -> None:
    model = with_lora(FAMILIES[family]())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained < {n for n, _ in model.named_parameters()}
    agree(model, BATCHES[family](), [trained, *subsets(model, 3)])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_costs_what_its_kernel_costs(
    dropout: float, attention: str, dtype: torch.dtype
) -> None:
    """The fused kernel computes the scores a second time in the backward pass; others do not."""
    changed = {"attention_probs_dropout_prob": dropout, "attn_implementation": attention}
    model = bert(2, dtype, **changed)
    agree(model, tokens()[0], subsets(model, 2))
    padded = tokens()[0]
    padded["attention_mask"][0, 4:] = 0
    agree(model, padded, subsets(model, 1))


def test_a_mask_that_trains_costs_what_products_cost() -> None:
    """The CPU's fused kernel has no gradient of a mask: T5's, which has its position bias in it."""
    model, batch = FAMILIES["t5"](), BATCHES["t5"]()
    turn_off_dropout(model)
    bias = {n for n, _ in model.named_parameters() if "relative_attention_bias" in n}
    agree(model, batch, [bias, *subsets(model, 4)])
    every = {n for n, _ in model.named_parameters()}
    graph = CostModel(model).graph(**batch)
    assert graph.cost(every).backward < graph.cost(every - bias).backward


class Convolutions(nn.Module):
    """Grouped, strided, dilated, transposed and one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.dilated = nn.Conv2d(12, 6, 3, dilation=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.line = nn.Conv1d(5, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dilated(self.grouped(self.first(inputs).relu()).relu()).relu()
        line = self.line(self.up(hidden).relu().flatten(2)).relu()
        result: Tensor = self.head(line.mean(2))
        return result


def products(output: Tensor, weight: Tensor) -> int:
    """FLOPs of a convolution by its definition: a window of the weight for each output value."""
    return 2 * output.numel() * weight[0].numel()


def test_convolutions_forward_by_definition() -> None:
    model = Convolutions()
    shapes: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if isinstance(module, nn.ConvTranspose2d):  # a window for each *input* value
                shapes[name] = 2 * args[0].numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                shapes[name] = 2 * output.numel() * module.in_features
            else:
                shapes[name] = products(output, module.weight)

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(note(name))
    inputs = torch.randn(2, 3, 16, 16)
    model(inputs)
    graph = CostModel(model).graph(inputs)
    assert graph.cost(()).forward == sum(shapes.values())
    # Each gradient of a product costs as much as the product; the input needs none.
    everything = {n for n, _ in model.named_parameters()}
    assert graph.cost(everything).backward == 2 * sum(shapes.values()) - shapes["first"]
    assert graph.cost({"line.weight"}).backward == shapes["line"] + shapes["head"]


def test_convolutions_cost_what_is_counted() -> None:
    """But for grouped ones: PyTorch's counter ignores the groups in the backward pass."""
    model = Convolutions()
    model.grouped = nn.Conv2d(8, 12, 3, padding=1)
    agree(model, {"inputs": torch.randn(2, 3, 16, 16)}, subsets(model, 6))


def test_a_linear_map_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = CostModel(model).graph(torch.zeros(3, 4))
    first, last = 2 * 3 * 4 * 8, 2 * 3 * 8 * 2
    assert graph.cost({"0.weight"}).total == (first + last) + (first + last)
    assert graph.cost({"0.bias"}).total == (first + last) + last
    assert graph.cost({"2.weight"}).total == (first + last) + last
    assert graph.cost({"2.bias"}).total == first + last
    assert graph.cost(()).backward == 0
    assert graph.cost({"no such parameter"}).backward == 0


BRANCHES = {
    "bert": "bert.encoder.layer.{}.output.dropout",
    "llama": "model.layers.{}.mlp",
    "gpt2": "transformer.h.{}.mlp",
}


def first_detached(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook."""
    if isinstance(output, tuple):
        return (output[0].detach(), *output[1:])
    return output.detach()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_detached_branches_cost_what_is_counted(family: str) -> None:
    model, batch = FAMILIES[family]().train(), BATCHES[family]()
    paths = dict(model.named_modules())
    graph = CostModel(model).graph(**batch)
    for depths in ((0,), (1,), (0, 1)):
        branches = [BRANCHES[family].format(depth) for depth in depths]
        handles = [paths[b].register_forward_hook(first_detached) for b in branches]
        for names in subsets(model, 3):
            train_only(model, names)
            model.zero_grad(set_to_none=True)
            cost = graph.cost(names, detached=branches)
            assert (cost.forward, cost.backward) == counted_flops(model, batch)
        for handle in handles:
            handle.remove()
    everything = {n for n, _ in model.named_parameters()}
    whole = graph.cost(everything).backward
    assert graph.cost(everything, detached=branches).backward < whole


def test_skipped_layers_cost_nothing() -> None:
    model, batch = bert().train(), tokens()[0]
    layers = model.bert.encoder.layer
    skipped = ["bert.encoder.layer.0"]
    graph = CostModel(model).graph(**batch)
    kept = {n for n, _ in model.named_parameters() if "layer.0" not in n and "embed" not in n}
    train_only(model, kept)
    layers[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    cost = graph.cost(kept, skipped=skipped)
    assert (cost.forward, cost.backward) == counted_flops(model, batch)
    assert cost.forward < graph.cost(kept).forward
    assert cost.backward == graph.cost(kept).backward


def test_costs_grow_with_the_set() -> None:
    model = bert()
    graph = CostModel(model).graph(**tokens()[0])
    names: set[str] = set()
    previous = graph.cost(names)
    for name, _ in reversed(list(model.named_parameters())):
        names.add(name)
        cost = graph.cost(names)
        assert cost.forward == previous.forward
        assert cost.backward >= previous.backward
        previous = cost
    assert previous.backward > previous.forward


def test_the_model_is_neither_changed_nor_followed() -> None:
    model = bert()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    hooks: list[int] = []
    model.register_forward_hook(lambda *_: hooks.append(1))
    costs = CostModel(model)
    first = costs.graph(**tokens()[0]).cost(costs.names).total
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, before[name])
        parameter.requires_grad_(False)
    assert not hooks
    model.classifier = nn.Identity()
    assert costs.graph(**tokens()[0]).cost(costs.names).total == first


# -- the meter --------------------------------------------------------------------------------


def test_the_meter_sums_what_each_step_cost() -> None:
    model, twin = bert(), bert()  # tracing under the counter would be counted, too
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    guide = Guide(model, optimizer, Config(policy="random", every=1, top=0.4))
    meter = FlopMeter(model)
    assert meter.share == 0
    spent = 0
    for batch in [*tokens(3), *tokens(2, rows=6)]:
        optimizer.zero_grad()
        train_only(twin, set(guide.active))
        spent += sum(counted_flops(twin, batch))
        bert_loss(model, batch).backward()
        assert meter.spent == spent
        optimizer.step()
    whole = CostModel(model)
    full = [whole.graph(**b).cost(whole.names).total for b in (tokens()[0], tokens(1, 6)[0])]
    assert meter.full == 3 * full[0] + 2 * full[1]
    assert meter.share == spent / meter.full
    assert 0.3 < meter.share < 1


def test_the_meter_counts_only_training() -> None:
    model = bert()
    meter = FlopMeter(model)
    with torch.no_grad():
        bert_loss(model, tokens()[0])
    model.eval()
    bert_loss(model, tokens()[0])
    assert (meter.spent, meter.full) == (0, 0)
    model.train()
    bert_loss(model, tokens()[0])
    assert meter.spent == meter.full > 0
    meter.close()
    bert_loss(model, tokens()[0])
    assert meter.spent == meter.full


def test_what_checkpointing_computes_again_is_not_counted() -> None:
    """PyTorch's counter counts it: a budget would then depend on how memory is saved."""
    model = bert()
    once = sum(counted_flops(bert(), tokens()[0]))
    checkpoint_activations(model)
    assert sum(counted_flops(model, tokens()[0])) > once
    meter = FlopMeter(model)
    bert_loss(model, tokens()[0]).backward()
    assert (meter.spent, meter.full) == (once, once)


def test_guiding_without_freezing_costs_what_full_fine_tuning_is_counted_to() -> None:
    counted = sum(counted_flops(bert(), tokens()[0]))  # tracing below would be counted, too
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    guide = Guide(model, optimizer, Config(policy="normalized-max", every=1))
    meter = FlopMeter(model)
    list(fit(model, optimizer, tokens(3), bert_loss))
    assert len(set(guide.plan.lr_scale)) > 1
    assert (meter.spent, meter.full, meter.share) == (3 * counted, 3 * counted, 1.0)


def test_lora_is_measured_against_the_model_without_it() -> None:
    from rgft.adapters.pairs import add_lora  # noqa: PLC0415 - slow to import

    plain = bert().eval()  # as models are loaded
    reference = CostModel(plain)
    full = sum(counted_flops(bert(), tokens()[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name that goes out of use
        model = add_lora(plain, 2).train()
    spent = sum(counted_flops(model, tokens()[0]))
    meter = FlopMeter(model, reference)
    bert_loss(model, tokens()[0])
    assert (meter.spent, meter.full) == (spent, full)
    assert 0.5 < meter.share < 1


def test_probes_are_spent_but_are_no_part_of_full_fine_tuning() -> None:
    model = nn.Linear(3, 2)
    meter = FlopMeter(model)
    model(torch.ones(4, 3))
    once = meter.spent
    assert once == meter.full > 0
    with meter.probing():
        model(torch.ones(4, 3))
    assert (meter.spent, meter.full) == (2 * once, once)


def test_what_is_known_of_shapes_is_of_the_meta_device_and_the_default_type() -> None:
    given = torch.empty(3, dtype=torch.long, device="meta")
    for _ in range(2):
        assert call(torch.ops.aten.new_zeros.default, (given, [2]), {"device": "cpu"}).is_cpu
        assert call(torch.ops.aten.div.Tensor, (given, given), {}).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert call(torch.ops.aten.div.Tensor, (given, given), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", COUNTED)
def test_what_is_known_of_shapes_is_what_would_be_worked_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = FAMILIES[family](), BATCHES[family]()
    CostModel(model).graph(**batch)
    known = CostModel(model).graph(**batch)
    monkeypatch.setattr(tracing, "call", lambda operator, args, kwargs: operator(*args, **kwargs))
    assert known == CostModel(model).graph(**batch)
