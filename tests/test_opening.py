"""How deep training reaches, against what PyTorch counts and against spending step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flops import ON_CPU, counted_flops
from rgft import Config, FlopMeter
from rgft.opening import (
    PASSES,
    VISITS,
    frozen_share,
    opened_below,
    passes_bought,
    passes_wanted,
    visit_costs,
)
from tiny import bert, tokens

LAYERS = 5
DEPTHS = (1, 2, 3, 4)  # below 4 nothing needs training
BATCH = tokens(rows=4)[0]


def frozen_layers(model: nn.Module, depth: int) -> list[nn.Module]:
    return list(model.bert.encoder.layer[: depth - 1])


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_costs_of_visits_are_what_is_counted(depth: int) -> None:
    model = bert(LAYERS)
    first, again = visit_costs(FlopMeter(model), Config(), BATCH, depth)
    frozen = [model.bert.embeddings, *frozen_layers(model, depth)]
    for module in frozen:
        module.requires_grad_(False)
    assert first * 4 == sum(counted_flops(model, BATCH))
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as prefix, torch.no_grad():
        hidden = model.bert.embeddings(BATCH["input_ids"])
        for layer in frozen_layers(model, depth):
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
    assert (first - again) * 4 == prefix.get_total_flops()


@pytest.mark.parametrize("limit", [0.5, 6.0, 7.0, 25.0])
def test_passes_are_those_of_visits_paid_one_by_one(limit: float) -> None:
    first, again, parts = 6.0, 2.0, 1000
    left, visited = limit, 0
    while left >= (price := (first if visited < parts else again) / parts) - 1e-9:
        left, visited = left - price, visited + 1
    assert passes_bought(limit, first, again) == pytest.approx(visited / parts, abs=2 / parts)


def test_a_larger_budget_reaches_deeper_and_never_above_what_is_known() -> None:
    meter = FlopMeter(bert(LAYERS))
    full = visit_costs(meter, Config(), BATCH, 1)[0]
    limits = [share * full for share in (0.1, 0.5, 0.9, 1.2, 1.49, 1.51, 9.0)]
    depths = [
        opened_below(DEPTHS, meter, Config(), BATCH, limit=limit, passes=PASSES) for limit in limits
    ]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 4
    assert len(set(depths)) > 2
    for limit, depth in zip(limits, depths, strict=True):
        bought = {d: visit_costs(meter, Config(), BATCH, d) for d in range(1, 4)}
        enough = [d for d, costs in bought.items() if passes_bought(limit, *costs) >= PASSES]
        assert depth == min([*enough, 4])


def test_few_samples_are_visited_often_before_depth_is_paid_for() -> None:
    meter = FlopMeter(bert(LAYERS))
    limit = 1.6 * visit_costs(meter, Config(), BATCH, 1)[0]
    depths = [
        opened_below(DEPTHS, meter, Config(), BATCH, limit=limit, passes=passes_wanted(rows, 12))
        for rows in (100_000, VISITS, 1_000, 10)
    ]
    assert depths[0] == depths[1] == 1  # a pass and a half is 2,000 visits or more
    assert 1 < depths[2] < depths[3] == DEPTHS[-1]


def test_share_of_the_layers_that_stay_frozen() -> None:
    model = bert(LAYERS)
    assert [frozen_share(model, depth) for depth in (0, 1, 2, 4, 5)] == [0, 0, 1 / 4, 3 / 4, 1]
