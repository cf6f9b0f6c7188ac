"""The cosine between gradients under a bypass and exact ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import tiny
from families import BATCHES, FAMILIES
from flops import result
from rgft import Bypass, InputError, gradient_agreement, partition, residual_branches

LAYERS = [f"bert.encoder.layer.{i}" for i in range(3)]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return result(model(**batch))


def summed(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> list[Tensor]:
    """Gradients that `backward` leaves behind, with some layers bypassed."""
    branches = residual_branches(model, partition(model, "layer"), lambda m: loss_of(m, batches[0]))
    bypass = Bypass(model, branches)
    bypass.set(names)
    model.zero_grad(set_to_none=True)
    for batch in batches:
        loss_of(model, batch).backward()
    bypass.close()
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def test_is_the_cosine_of_what_backward_computes() -> None:
    model, batches = tiny.bert(dtype=torch.float64), tiny.tokens(3)
    exact = summed(model, batches, [])
    bypassed = summed(model, batches, LAYERS[1:2])
    names = [name for name, _ in model.named_parameters()]
    agreement = gradient_agreement(model, loss_of, batches, LAYERS[1:2])

    def cosine(prefix: str) -> float:
        pairs = [
            (e.flatten(), b.flatten())
            for n, e, b in zip(names, exact, bypassed, strict=True)
            if n.startswith(prefix) and b.ndim
        ]
        left, right = (torch.cat(side) for side in zip(*pairs, strict=True))
        return float(torch.cosine_similarity(left, right, dim=0))

    assert agreement.cosine == pytest.approx(cosine(""), abs=1e-12)
    for layer in LAYERS:
        assert agreement.by_component[layer] == pytest.approx(cosine(layer), abs=1e-12)
    assert agreement.by_component[LAYERS[2]] == pytest.approx(1, abs=1e-12)
    assert 0 < agreement.by_component[LAYERS[0]] < 1 - 1e-6
    assert set(agreement.by_component) == {c.name for c in partition(model, "layer")}


def test_agrees_fully_under_dropout_when_nothing_is_bypassed() -> None:
    model = FAMILIES["bert"]().train()
    agreement = gradient_agreement(model, loss_of, [BATCHES["bert"]()] * 2, [])
    assert agreement.cosine == pytest.approx(1, abs=1e-6)


def test_only_what_trains_counts() -> None:
    model, batches = tiny.bert(dtype=torch.float64), tiny.tokens(1)
    model.bert.requires_grad_(False)  # type: ignore[union-attr]
    model.bert.encoder.layer[2].requires_grad_(True)  # type: ignore[union-attr,index]
    agreement = gradient_agreement(model, loss_of, batches, LAYERS[:2])
    assert set(agreement.by_component) == {LAYERS[2], "classifier"}
    assert agreement.cosine == pytest.approx(1, abs=1e-12)


def test_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["resnet"]().train()
    before = copy.deepcopy(model.state_dict())
    marker = torch.ones_like(model.fc.weight)
    model.fc.weight.grad = marker
    gradient_agreement(model, loss_of, [BATCHES["resnet"]()], ["layer1.0"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.fc.weight.grad is marker and model.conv1.weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_a_gradient_of_zero_has_no_direction() -> None:
    model, batches = tiny.bert(dtype=torch.float64), tiny.tokens(1)
    agreement = gradient_agreement(model, lambda m, b: 0 * loss_of(m, b), batches, LAYERS[:1])
    assert math.isnan(agreement.cosine)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("evaluation", "the model is in evaluation mode"),
        ("bypassed", "the model is bypassed, so no gradient of it is exact"),
        ("no batch", "there are no batches"),
        ("nothing trains", "no parameter that requires a gradient gets one under this bypass"),
        ("no such layer", "component 'layer.9' cannot be bypassed"),
    ],
)
def test_what_cannot_be_compared_is_said(case: str, message: str) -> None:
    model, batches = tiny.bert(), tiny.tokens(1)
    bypassed = ["layer.9"] if case == "no such layer" else LAYERS[:1]
    if case == "evaluation":
        model.eval()
    if case == "bypassed":
        branches = residual_branches(model, partition(model, "layer"), lambda m: m(**batches[0]))
        Bypass(model, branches).set(LAYERS[1:])
    if case == "nothing trains":
        model.requires_grad_(False)
        model.bert.encoder.layer[0].attention.self.requires_grad_(True)  # type: ignore[union-attr,index]
    with pytest.raises(InputError, match=message):
        gradient_agreement(model, loss_of, [] if case == "no batch" else batches, bypassed)
