"""Budgets: what they mean, when they end, and that they are met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from transformers import Trainer, TrainingArguments

from flops import counted_flops
from rgft import Config, CostModel, FlopMeter, Guide, InputError
from rgft.costs import Action, LatestCosts
from rgft.integrations.transformers import RGFTCallback
from rgft.spending import Budget, Spending, parse_budget
from tiny import bert, bert_loss, tokens


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.3", Budget(share=0.3)),
        ("1", Budget(share=1.0)),
        (" .05 ", Budget(share=0.05)),
        ("90s", Budget(seconds=90)),
        ("20 min", Budget(seconds=1200)),
        ("1.5h", Budget(seconds=5400)),
    ],
)
def test_texts(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "1.1", "-0.3", "30%", "20 minutes", "nan", "1.2.3"]
)
def test_bad_texts(text: str) -> None:
    with pytest.raises(InputError, match=r"budget is .*; allowed: a share"):
        parse_budget(text)


def test_a_share_of_something_unknown() -> None:
    with pytest.raises(InputError, match="full= or batches="):
        Spending(FlopMeter(bert()), Budget(share=0.5))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_over_an_interruption() -> None:
    clock = Clock()
    spending = Spending(FlopMeter(bert()), Budget(seconds=10), clock=clock)
    for _ in range(3):
        clock.now += 2
        spending.step()
        assert not spending.finished
    state = spending.state_dict()
    clock = Clock()
    resumed = Spending(FlopMeter(bert()), Budget(seconds=10), clock=clock)
    resumed.load_state_dict(state)
    assert resumed.progress == pytest.approx(0.6)
    clock.now += 2
    resumed.step()
    assert not resumed.finished
    clock.now += 2
    resumed.step()
    assert resumed.finished
    assert resumed.progress == 1


def test_the_schedule_follows_the_budget() -> None:
    clock = Clock()
    spending = Spending(FlopMeter(bert()), Budget(seconds=10), clock=clock)
    paced = spending.paced(lambda step: 1 - step / 50, 50)
    assert paced(0) == paced(40) == 1
    clock.now += 5
    assert paced(0) == paced(1) == 0.5
    clock.now += 50
    assert paced(0) == 0


@pytest.mark.parametrize("policy", ["uniform", "purchase", "suffix", "normalized-max"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_loop_ends_at_its_budget(policy: str, share: float) -> None:
    """FLOPs counted by torch on a twin: probe steps and all."""
    model, twin = bert(), bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    batches, full = tokens(5), CostModel(model)
    whole = 60 * full.step(full.graph(**batches[0]), Action(full.names)).total
    spending = Spending(FlopMeter(model), Budget(share=share), batches=60)
    guide = Guide(model, optimizer, Config(policy=policy, every=4), spending=spending)
    spent = steps = 0
    while not spending.finished:
        batch = batches[steps % 5]
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in guide.active)
        twin.zero_grad(set_to_none=True)
        spent += sum(counted_flops(twin, batch))
        optimizer.zero_grad()
        bert_loss(model, batch).backward()
        optimizer.step()
        spending.step()
        steps += 1
    guide.close()
    assert spending.full == whole
    assert spent == spending.meter.spent
    assert abs(spent / whole - share) <= 0.5 / 60
    assert steps >= share * 60 - 0.5
    assert policy in ("uniform", "normalized-max") or steps > share * 60


def test_purchases_keep_to_their_rate() -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    spending = Spending(FlopMeter(model), Budget(share=0.9), batches=60)
    config = Config(policy="purchase", rate=0.55, every=3, probe_every=0)
    guide = Guide(model, optimizer, config, spending=spending)
    for batch in tokens(7):
        optimizer.zero_grad()
        bert_loss(model, batch).backward()
        optimizer.step()
        spending.step()
    costs = LatestCosts(spending.meter).of(guide.components)
    assert costs is not None
    trained = [i for i, on in enumerate(guide.plan.trained) if on]
    assert 0.34 < costs.cost(trained) <= 0.55
    guide.close()


@pytest.mark.parametrize(("rate", "rate_end"), [(1.0, 0.4), (0.4, 1.0)])
def test_purchases_widen_or_narrow_over_the_run(rate: float, rate_end: float) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    spending = Spending(FlopMeter(model), Budget(share=0.7), batches=40)
    config = Config(policy="purchase", rate=rate, rate_end=rate_end, every=2, probe_every=0)
    guide = Guide(model, optimizer, config, spending=spending)
    (batch,) = tokens()
    prices: list[float] = []
    while not spending.finished:
        plan = guide.plan
        optimizer.zero_grad()
        bert_loss(model, batch).backward()
        allowed = rate + spending.progress * (rate_end - rate)
        optimizer.step()
        spending.step()
        costs = LatestCosts(spending.meter).of(guide.components)
        assert costs is not None
        if guide.plan is not plan:
            prices.append(costs.cost([i for i, on in enumerate(guide.plan.trained) if on]))
            assert prices[-1] <= allowed + 1e-9
    guide.close()
    assert len(prices) > 10
    first, last = prices[0], prices[-1]
    assert first > last + 0.2 if rate > rate_end else last > first + 0.2


def test_purchases_need_prices() -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(InputError, match="needs to know what steps cost"):
        Guide(model, optimizer, Config(policy="purchase"))


def test_what_stays_frozen_is_never_probed() -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    guide = Guide(model, optimizer, Config(policy="top", top=0.5, frozen_below=2, every=2))
    low = {s.parameter for c in guide.components if c.depth < 2 for s in c.slices}
    for batch in tokens(6):
        assert not low & guide.active
        optimizer.zero_grad()
        bert_loss(model, batch).backward()
        optimizer.step()
    guide.close()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in low) or name not in low
    with pytest.raises(InputError, match="frozen_below is 99; allowed: at most"):
        Guide(model, optimizer, Config(frozen_below=99, always_train=()))


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a batch, over and over."""

    def __init__(self, count: int) -> None:
        batch = tokens()[0]
        self.rows = [{k: v[i % len(v)] for k, v in batch.items()} for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trainer(model: nn.Module, callback: RGFTCallback, folder: str, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(80), callbacks=[callback])


def test_a_trainer_stops_at_its_budget(tmp_path: Any) -> None:
    callback = RGFTCallback(Config(every=2), budget=0.5)
    runner = trainer(bert(), callback, str(tmp_path))
    runner.train()
    assert callback.spending is not None
    assert callback.spending.meter.share * runner.state.global_step / 40 == pytest.approx(0.5)
    assert runner.state.global_step == 20
    rates = [entry["learning_rate"] for entry in runner.state.log_history if "loss" in entry]
    assert rates[0] == pytest.approx(5e-5)
    assert rates[-1] == pytest.approx(5e-5 / 20)
    assert rates == sorted(rates, reverse=True)


def test_a_trainer_with_steps_too_few_says_so(tmp_path: Any) -> None:
    callback = RGFTCallback(Config(policy="head-only"), budget=1.0)
    with pytest.warns(RuntimeWarning, match="of the budget spent"):
        trainer(bert(), callback, str(tmp_path)).train()


def test_a_schedule_that_cannot_be_paced(tmp_path: Any) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    runner = trainer(model, RGFTCallback(budget="20min"), str(tmp_path))
    runner.optimizer, runner.lr_scheduler = optimizer, StepLR(optimizer, 3)
    with pytest.raises(InputError, match="StepLR, which a budget cannot pace"):
        runner.train()


def test_a_trainer_whose_budget_ends_before_a_decision_says_so(tmp_path: Any) -> None:
    with pytest.warns(RuntimeWarning, match="ended before the method's first decision"):
        trainer(bert(), RGFTCallback(Config(every=15), budget=0.3), str(tmp_path)).train()


def test_a_model_in_evaluation_mode_would_never_spend_its_budget() -> None:
    model, (batch, *_) = bert().eval(), tokens()
    spending = Spending(FlopMeter(model), Budget(share=0.5), batches=4)
    model(**batch).logits.sum().backward()
    with pytest.raises(InputError, match=r"call model\.train\(\)"):
        spending.step()
    model.train()(**batch).logits.sum().backward()
    spending.step()
    assert spending.progress == pytest.approx(0.5)
