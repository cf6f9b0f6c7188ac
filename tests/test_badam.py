"""BAdam against its definition in a plain loop, and against its authors' package."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rgft import Config, FlopMeter, Guide, Spending
from rgft.spending import Budget
from tiny import Batch, bert, bert_loss, fit, optimizer_state, same_state, tokens, values

EVERY, CYCLES, LAYERS = 3, 3, 3
STEPS = EVERY * CYCLES * LAYERS
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def guided(batches: list[Batch], **changes: Any) -> tuple[nn.Module, list[int]]:
    """A model trained by the policy, and which layer trained at each step."""
    model = bert(LAYERS)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    guide = Guide(model, optimizer, Config(policy="badam", every=EVERY, **changes))
    order = []
    for batch in batches:
        kinds = (c.kind for c in guide.components)
        on = zip(guide.plan.trained, kinds, strict=True)
        order.append([trained for trained, kind in on if kind == "layer"].index(True))
        list(fit(model, optimizer, [batch], bert_loss))
        held = [name for name, state in optimizer_state(model, optimizer).items() if state]
        assert all(f"layer.{order[-1]}." in n or n.startswith("classifier") for n in held)
    guide.close()
    return model, order


def test_weights_are_those_of_adam_begun_anew_for_each_block() -> None:
    """Also where the last layer of a cycle is the first of the next; the head goes on."""
    batches = tokens(STEPS)
    trained, order = guided(batches, seed=1)
    assert [sorted(order[i : i + 9 : EVERY]) for i in range(0, STEPS, 9)] == [[0, 1, 2]] * CYCLES
    repeats = [order[i - 1] == order[i] for i in range(9, STEPS, 9)]
    assert repeats == [True, False]
    model: Any = bert(LAYERS)
    parts = [*model.bert.encoder.layer, model.classifier]
    model.requires_grad_(False)
    head = torch.optim.AdamW(model.classifier.parameters(), **SETTINGS)
    for step, batch in enumerate(batches):
        if step % EVERY == 0:
            block = torch.optim.AdamW(parts[order[step]].parameters(), **SETTINGS)
            model.requires_grad_(False)
            parts[order[step]].requires_grad_(True)
            parts[-1].requires_grad_(True)
        model.zero_grad()
        bert_loss(model, batch).backward()
        block.step()
        head.step()
    assert same_state(values(model), values(trained))


def test_weights_are_those_of_the_package() -> None:
    """In the same order, without a head; its first block is a step short if it is not told."""
    badam = pytest.importorskip("badam")
    batches = tokens(STEPS)
    trained, order = guided(batches, always_train=())
    model = bert(LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it expects weights in 16 bits
        optimizer = badam.BlockOptimizer(
            torch.optim.AdamW(model.parameters(), **SETTINGS),
            list(model.named_parameters()),
            [[f"bert.encoder.layer.{i}."] for i in range(LAYERS)],
            switch_block_every=EVERY,
            start_block=order[0],
            switch_mode="fixed",
        )
    optimizer.global_step = -1
    for step, batch in enumerate(batches):
        optimizer.current_block_idx = order[min(step + 1, STEPS - 1)]
        list(fit(model, optimizer, [batch], bert_loss))
    assert same_state(values(model), values(trained))


@pytest.mark.parametrize("planned", [False, True])
def test_a_run_shorter_than_a_cycle_says_how_many_layers_it_misses(planned: bool) -> None:
    said = "1 of 3 layers get no turn to train in this run: a cycle takes 9 steps (3 for each), and"
    for steps in (6, 7):
        model = bert(LAYERS)
        optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
        total = {"total_steps": steps} if planned else {}
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            guide = Guide(model, optimizer, Config(policy="badam", every=EVERY, **total))
            early = len(notes)
            list(fit(model, optimizer, tokens(steps), bert_loss))
            guide.close()
            guide.close()
        assert [early, len(notes)] == [(steps == 6) * planned, int(steps == 6)]
        assert all(
            f"{said} the run has 6; set every to at most 2" in str(note.message) for note in notes
        )


def test_a_budget_that_ends_within_a_cycle_says_so() -> None:
    """Its steps are not known before."""
    model = bert(LAYERS)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    spending = Spending(FlopMeter(model), Budget(share=0.2), batches=20)
    config = Config(policy="badam", every=9, total_steps=80)
    guide = Guide(model, optimizer, config, spending=spending)
    for batch in tokens(80):
        list(fit(model, optimizer, [batch], bert_loss))
        spending.step()
        if spending.finished:
            break
    assert guide.step < 18
    with pytest.warns(RuntimeWarning, match=r"\d of 3 layers get no turn to train"):
        guide.close()
