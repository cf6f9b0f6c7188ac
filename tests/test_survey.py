"""The survey's regression against refitting, and what it says of models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from families import BATCHES, FAMILIES
from rgft import InputError
from rgft.survey import PENALTIES, Survey, ridge_explained, survey


def by_refitting(features: Tensor, targets: Tensor) -> float:
    """Leave each sample out in turn; centring and scaling are those of the whole."""
    count, width = features.shape
    x = features.double() - features.double().mean(0)
    x = x / x.square().mean(0).sqrt() / width**0.5
    y = targets.double()
    best = 0.0
    for penalty in PENALTIES:
        wrong = plain = 0.0
        for n in range(count):
            rest = torch.arange(count) != n
            ones = torch.ones(count, 1, dtype=torch.float64)
            design = torch.cat([x, ones], 1)[rest]
            ridge = penalty * torch.eye(width + 1, dtype=torch.float64)
            ridge[-1, -1] = 0  # the intercept is free
            fit = torch.linalg.solve(design.T @ design + ridge, design.T @ y[rest])
            wrong += float((y[n] - torch.cat([x, ones], 1)[n] @ fit).square().sum())
            plain += float((y[n] - y[rest].mean(0)).square().sum())
        best = max(best, 1 - wrong / plain)
    return best


@pytest.mark.parametrize(("count", "width"), [(12, 3), (20, 30), (40, 8)])
def test_leaving_one_out_is_refitting(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, width, generator=generator)
    targets = features[:, :2] + 0.3 * torch.randn(count, 2, generator=generator)
    assert ridge_explained(features, targets) == pytest.approx(by_refitting(features, targets))


def test_noise_explains_nothing_and_the_answer_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    targets = nn.functional.one_hot(labels).float()
    noise = torch.randn(300, 16, generator=generator)
    assert ridge_explained(noise, targets) < 0.05
    assert ridge_explained(torch.cat([noise, targets], 1), targets) > 0.99


class Knowing(nn.Module):
    """Layers that pass noise on until layer `at`, which knows the label."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i == at) for i in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor, truth: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs, truth)
        result: Tensor = self.head(inputs)
        return result


class Block(nn.Module):
    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.up, self.down, self.knows = nn.Linear(8, 8), nn.Linear(8, 8), knows

    def forward(self, inputs: Tensor, truth: Tensor) -> Tensor:
        result: Tensor = inputs + 0.1 * self.down(self.up(inputs).relu())
        if self.knows:
            result = torch.cat([result[:, :7], truth[:, None] * 3.0], 1)
        return result


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        labels = torch.randint(2, (40,), generator=generator)
        inputs = torch.randn(40, 8, generator=generator)
        made.append({"inputs": inputs, "truth": labels.float(), "labels": labels})
    return made


@pytest.mark.parametrize(("at", "first"), [(0, 1), (1, 2), (2, 3), (3, 3), (None, 1)])
def test_what_is_known_below_stays_frozen(at: int | None, first: int) -> None:
    torch.manual_seed(0)
    model = Knowing(at).train()
    found = survey(model, batches())
    assert found.depths == (1, 2, 3, 4)
    assert found.samples == 240
    assert found.frozen_below() == first
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2_classifier", "vit", "resnet", "deberta_v2"])
def test_any_architecture(family: str) -> None:
    model, batch = FAMILIES[family](), BATCHES[family]()
    rows = len(batch["labels"]) if "labels" in batch else len(next(iter(batch.values())))
    batch = {**batch, "labels": torch.arange(rows) % 2}
    found = survey(model, [batch, batch, batch])
    assert len(found.explained) == len(found.depths) >= 2
    assert all(0 <= r <= 1 for r in found.explained)


def test_padding_is_left_out() -> None:
    model = FAMILIES["bert"]().eval()
    batch = BATCHES["bert"]()
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    longer = {
        **batch,
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 3)),
    }
    if "token_type_ids" in batch:
        longer["token_type_ids"] = nn.functional.pad(batch["token_type_ids"], (0, 3))
    short, long = survey(model, [batch] * 3), survey(model, [longer] * 3)
    assert long.explained == pytest.approx(short.explained, abs=1e-4)


def test_refusals() -> None:
    with pytest.raises(InputError, match="different labels"):
        survey(Knowing(0), [{**batches()[0], "labels": torch.zeros(40, dtype=torch.int64)}])
    with pytest.raises(InputError, match="different labels"):
        survey(Knowing(0), [])
    with pytest.raises(InputError, match="one label a sample"):
        survey(Knowing(0), [{**batches()[0], "labels": torch.zeros(40, 2, dtype=torch.int64)}])
    with pytest.raises(InputError, match="no layers"):
        survey(nn.Linear(2, 2), [])


def test_two_layers_train_of_those_that_are_of_use() -> None:
    """What one layer knows, the next one alone has too little to learn with."""
    for explained in ((0.5, 0.1, 0.1), (0.5, 0.5, 0.5), (0.3, 0.4, 0.5), (0.1, 0.5, 0.1)):
        found = Survey((1, 2, 3), explained, 10)
        assert found.layers() - found.frozen_below() + 1 >= 2
    assert Survey((1, 2, 3, 4), (0.5, 0.52, 0.51, 0.5), 10).frozen_below() == 2
    assert Survey((1,), (0.5,), 10).frozen_below() == 1


def test_layers_that_are_kept_anyhow_count() -> None:
    found = Survey((1, 2, 3, 4), (0.5, 0.1, 0.1, 0.1), 10)
    assert found.layers() == 2
    assert found.frozen_below() == 1
    assert found.frozen_below(4) == 2


def test_ties_take_the_lowest() -> None:
    assert Survey((1, 2, 3, 4), (0.45, 0.47, 0.47, 0.5), 10).frozen_below() == 2
