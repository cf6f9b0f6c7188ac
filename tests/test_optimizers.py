"""Every optimizer through every property, against the same optimizer with real groups."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import GROUP_STATE, LR, NEEDS, ONE_RATE, OWN_STATE
from rgft import Config, EngagementError, Guide, InputError, Policy, split_groups
from tiny import (
    bert,
    bert_loss,
    fit,
    mlp_batches,
    same_state,
    squared_error,
    tokens,
    values,
)

EVERY = {**OWN_STATE, **GROUP_STATE, **ONE_RATE}
SCALES = (0.5, 0.0, 2.0)
FREEZING = (1.0, 0.0, 1.0)


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """torchao compiles one function per shape; what it computes is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def network() -> nn.Sequential:
    """The components "0", "2" and "4", without biases, which Muon refuses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False)]
        return nn.Sequential(*layers, nn.Tanh(), nn.Linear(64, 3, bias=False))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return mlp_batches(count, torch.float32)


def make(name: str, params: Any) -> torch.optim.Optimizer:
    package = NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return EVERY[name](params)


def fixed(scale: tuple[float, ...]) -> Policy:
    return Policy(
        lambda _: torch.tensor(scale, dtype=torch.float64), uses_error=False, changes=False
    )


def scales_for(name: str) -> tuple[float, ...]:
    return FREEZING if name in ONE_RATE else SCALES


def planned(name: str, rule: Callable[[Any], Tensor]) -> tuple[nn.Sequential, Any]:
    """A model under a guide whose plans follow `rule`, decided every second step."""
    model = network()
    optimizer = make(name, model.parameters())
    if name in GROUP_STATE:
        split_groups(optimizer, model)
    Guide(model, optimizer, Config(policy=Policy(rule, uses_error=False), every=2))
    return model, optimizer


def guided(name: str, scale: tuple[float, ...]) -> tuple[nn.Module, Any, Guide]:
    model = network()
    optimizer = make(name, model.parameters())
    if name in GROUP_STATE:
        split_groups(optimizer, model)
    return model, optimizer, Guide(model, optimizer, Config(policy=fixed(scale), every=2))


def with_real_groups(name: str, scale: tuple[float, ...]) -> tuple[nn.Module, Any]:
    """By hand: a group a layer, and no gradient for what is frozen."""
    model = network()
    groups = [{"params": [model[2 * i].weight]} for i in range(3)]
    optimizer = make(name, groups)
    for group, multiplier in zip(optimizer.param_groups, scale, strict=True):
        group["lr"] = group["lr"] * (multiplier or 1.0)
        group["params"][0].requires_grad_(multiplier > 0)
    return model, optimizer


def through_a_file(state: Any, name: str) -> Any:
    """As it comes back from a checkpoint: loading a state would share its tensors otherwise."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    # torchao's own 8-bit tensors are a class
    return torch.load(file, weights_only=name != "torchao-8bit")


@pytest.mark.parametrize("name", EVERY)
def test_multipliers_equal_real_groups_bit_for_bit(name: str) -> None:
    scale = scales_for(name)
    model, optimizer, _ = guided(name, scale)
    by_hand, real = with_real_groups(name, scale)
    start = values(model)
    list(fit(model, optimizer, batches(6), squared_error))
    list(fit(by_hand, real, batches(6), squared_error))
    assert same_state(values(model), values(by_hand))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {"0.weight", "4.weight"}


@pytest.mark.parametrize("name", EVERY)
def test_frozen_weights_keep_their_bits_after_they_have_moved(name: str) -> None:
    """With momentum and weight decay at work, and through gradients that are 0, not None."""

    def later(situation: Any) -> Tensor:
        scale = (1.0, 1.0, 1.0) if situation.step < 2 else scales_for(name)
        return torch.tensor(scale, dtype=torch.float64)

    model, optimizer = planned(name, later)
    steps = batches(8)
    list(fit(model, optimizer, steps[:2], squared_error))
    weights = values(model)
    state = through_a_file(dict(optimizer.state[model[2].weight]), name)
    for batch in steps[2:]:
        optimizer.zero_grad(set_to_none=False)
        squared_error(model, batch).backward()
        optimizer.step()
    assert torch.equal(model[2].weight, weights["2.weight"])
    assert not torch.equal(model[0].weight, weights["0.weight"])
    for key, value in state.items():
        now = optimizer.state[model[2].weight][key]
        if hasattr(value, "codes"):  # torchao
            assert torch.equal(now.codes, value.codes), key
        else:
            assert same_state(now, value), key


@pytest.mark.parametrize("name", EVERY)
def test_a_component_that_comes_back_steps_as_one_that_was_without_a_gradient(name: str) -> None:
    def later(situation: Any) -> Tensor:
        scale = scales_for(name) if situation.step < 2 else (1.0, 1.0, 1.0)
        return torch.tensor(scale, dtype=torch.float64)

    model, optimizer = planned(name, later)
    by_hand, real = with_real_groups(name, scales_for(name))
    steps = batches(5)
    list(fit(model, optimizer, steps, squared_error))
    list(fit(by_hand, real, steps[:2], squared_error))
    by_hand[2].weight.requires_grad_(True)
    for group, scale in zip(real.param_groups, scales_for(name), strict=True):
        group["lr"] = group["lr"] / (scale or 1.0)
    list(fit(by_hand, real, steps[2:], squared_error))
    assert same_state(values(model), values(by_hand))
    assert not torch.equal(model[2].weight, network()[2].weight)


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_is_the_run(name: str) -> None:
    scale, steps = scales_for(name), batches(7)
    whole, first, second = (guided(name, scale) for _ in range(3))
    list(fit(whole[0], whole[1], steps, squared_error))
    list(fit(first[0], first[1], steps[:3], squared_error))
    states = through_a_file([part.state_dict() for part in first], name)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    list(fit(second[0], second[1], steps[3:], squared_error))
    assert same_state(values(whole[0]), values(second[0]))


@pytest.mark.parametrize("name", EVERY)
def test_a_plain_checkpoint_is_taken_over(name: str) -> None:
    """Train without the guide, then with it: the state is that of the plain optimizer."""
    steps, scale = batches(6), scales_for(name)
    plain = network()
    optimizer = make(name, plain.parameters())
    list(fit(plain, optimizer, steps[:3], squared_error))
    model = network()
    ours = make(name, model.parameters())
    if name in GROUP_STATE:
        split_groups(ours, model)
    model.load_state_dict(plain.state_dict())
    ours.load_state_dict(through_a_file(optimizer.state_dict(), name))
    Guide(model, ours, Config(policy=fixed(scale), every=2))
    list(fit(model, ours, steps[3:], squared_error))

    by_hand = network()
    real = make(name, by_hand.parameters())
    list(fit(by_hand, real, steps[:3], squared_error))
    groups = [
        {**real.param_groups[0], "params": [by_hand[2 * i].weight], "lr": rate * m}
        for i, m in enumerate(scale)
        for rate in [real.param_groups[0]["lr"]]
        if m
    ]
    by_hand[2].weight.requires_grad_(False)
    real.param_groups[:] = groups
    list(fit(by_hand, real, steps[3:], squared_error))
    assert same_state(values(model), values(by_hand))


# torch's fused SGD cannot step parameters with and without momentum so far in one group
@pytest.mark.parametrize("name", sorted({*OWN_STATE, *ONE_RATE} - {"sgd-fused"}))
def test_the_plain_optimizer_takes_over_a_guided_checkpoint(name: str) -> None:
    model, optimizer, guide = guided(name, scales_for(name))
    list(fit(model, optimizer, batches(3), squared_error))
    state = through_a_file(optimizer.state_dict(), name)
    guide.close()
    plain = network()
    plain.load_state_dict(model.state_dict())
    other = make(name, plain.parameters())
    other.load_state_dict(state)
    list(fit(plain, other, batches(5)[3:], squared_error))
    list(fit(model, optimizer, batches(5)[3:], squared_error))
    assert same_state(values(plain), values(model))


@pytest.mark.parametrize("name", GROUP_STATE)
def test_split_groups_do_not_load_into_an_optimizer_without(name: str) -> None:
    _, optimizer, _ = guided(name, SCALES)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make(name, network().parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", EVERY)
def test_the_scheduler_sees_the_unscaled_rate(name: str) -> None:
    """ExponentialLR multiplies what it finds: a multiplier left behind would compound.

    The steps themselves are those of real groups with a scheduler of their own.
    """
    model, optimizer, _ = guided(name, scales_for(name))
    by_hand, real = with_real_groups(name, scales_for(name))
    first = float(optimizer.param_groups[0]["lr"])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, real)]
    for step, batch in enumerate(batches(8)):  # RAdam moves from the 6th on
        for group in optimizer.param_groups:
            assert float(group["lr"]) == first / 2**step
        list(fit(model, optimizer, [batch], squared_error))
        list(fit(by_hand, real, [batch], squared_error))
        for scheduler in schedulers:
            scheduler.step()
    assert same_state(values(model), values(by_hand))


# -- state in groups --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUP_STATE)
def test_multipliers_on_one_shared_group_are_refused(name: str) -> None:
    model = network()
    optimizer = make(name, model.parameters())
    Guide(model, optimizer, Config(policy=fixed((0.5, 1.0, 2.0)), every=1))
    with pytest.raises(InputError, match=r"call rgft\.split_groups") as caught:
        list(fit(model, optimizer, batches(8), squared_error))  # RAdam begins to move at the 6th
    assert "\n" not in str(caught.value)


def test_heads_are_refused_with_state_in_groups() -> None:
    model = bert(2)
    optimizer = make("schedule-free-adamw", model.parameters())
    split_groups(optimizer, model, "head")

    def by_index(situation: Any) -> Tensor:
        return 1.0 + torch.arange(len(situation.error), dtype=torch.float64)

    Guide(model, optimizer, Config(granularity="head", policy=Policy(by_index, False), every=1))
    with pytest.raises(InputError, match=r"keeps state in its parameter groups.*attention heads"):
        list(fit(model, optimizer, tokens(2), bert_loss))


@pytest.mark.parametrize("name", GROUP_STATE)
@pytest.mark.parametrize("meddled", [False, True])
def test_averages_are_no_alarm_but_steps_of_frozen_weights_are(name: str, meddled: bool) -> None:
    """`eval()` and `train()` move all weights and back, with rounding."""

    def later(situation: Any) -> Tensor:
        scale = (1.0, 1.0, 1.0) if situation.step < 8 else FREEZING
        return torch.tensor(scale, dtype=torch.float64)

    model = network()
    optimizer = make(name, model.parameters())
    split_groups(optimizer, model)
    guide = Guide(model, optimizer, Config(policy=Policy(later, False), every=4, warmup=8))
    for batch in batches(11):
        optimizer.eval()  # type: ignore[attr-defined]
        optimizer.train()  # type: ignore[attr-defined]
        list(fit(model, optimizer, [batch], squared_error))
    if meddled:
        optimizer.state[model[2].weight]["z"].add_(1.0)
        with pytest.raises(EngagementError, match=r"frozen parameter '2\.weight' changed"):
            guide.close()
    else:
        guide.close()
    assert not guide.plan.trained[1]


@pytest.mark.parametrize("used", ["stepped", "scheduled"])
def test_groups_are_split_before_anything_else(used: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    if used == "stepped":
        list(fit(model, optimizer, batches(1), squared_error))
    else:
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(InputError, match="directly after making the optimizer"):
        split_groups(optimizer, model)


# -- one rate for all -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_RATE)
def test_a_policy_that_scales_is_refused_at_once_with_one_rate(name: str) -> None:
    model = network()
    with pytest.raises(InputError, match="multipliers other than 0 and 1 cannot act") as caught:
        Guide(model, make(name, model.parameters()), Config(policy="normalized-max"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ONE_RATE)
def test_a_plan_that_scales_is_refused_with_one_rate(name: str) -> None:
    model = network()
    optimizer = make(name, model.parameters())
    Guide(model, optimizer, Config(policy=fixed((0.5, 1.0, 2.0)), every=1))
    with pytest.raises(InputError, match="multipliers other than 0 and 1 cannot act"):
        list(fit(model, optimizer, batches(1), squared_error))


def test_a_group_that_is_frozen_goes_on_counting() -> None:
    """Prodigy reads its estimate from the first group: frozen, it must not go stale."""
    scale, steps = (0.0, 1.0, 1.0), batches(6)
    model, by_hand = network(), network()
    by_hand[0].weight.requires_grad_(False)
    pair = [
        optimizers.ONE_RATE["prodigy"]([{"params": [m[i].weight]} for i in (0, 2, 4)])
        for m in (model, by_hand)
    ]
    Guide(model, pair[0], Config(policy=fixed(scale), every=1))
    list(fit(model, pair[0], steps, squared_error))
    list(fit(by_hand, pair[1], steps, squared_error))
    assert same_state(values(model), values(by_hand))
    assert [g["d"] for g in pair[0].param_groups] == [g["d"] for g in pair[1].param_groups]
    assert pair[0].param_groups[0]["d"] > 1e-6


# -- rates of the optimizer's own -------------------------------------------------------------


class Multiplied(optimizers.transformers.Adafactor):
    """Relative steps times a multiplier of the group."""

    @staticmethod
    def _get_lr(group: dict[str, Any], state: dict[str, Any]) -> float:
        rate = optimizers.transformers.Adafactor._get_lr(group, state)
        return float(rate * group["multiplier"])


RELATIVE = [
    {"lr": None, "relative_step": True, "scale_parameter": scale, "warmup_init": warm}
    for scale in (True, False)
    for warm in (True, False)
]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("settings", RELATIVE, ids=str)
def test_relative_steps_are_multiplied(settings: dict[str, Any], scheduled: bool) -> None:
    """Its scheduler fills in a learning rate that the steps ignore."""
    model, by_hand = network(), network()
    optimizer = optimizers.adafactor(model.parameters(), weight_decay=0.1, **settings)
    groups = [
        {"params": [by_hand[2 * i].weight], "multiplier": m} for i, m in enumerate(SCALES) if m
    ]
    by_hand[2].weight.requires_grad_(False)
    real = Multiplied(groups, weight_decay=0.1, **settings)
    Guide(model, optimizer, Config(policy=fixed(SCALES), every=2))
    schedule = optimizers.transformers.optimization.AdafactorSchedule
    scheduler = schedule(optimizer) if scheduled else None
    for batch in batches(6):
        list(fit(model, optimizer, [batch], squared_error))
        list(fit(by_hand, real, [batch], squared_error))
        if scheduler is not None:
            scheduler.step()
    for name, value in values(by_hand).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(model[2].weight, network()[2].weight)


def test_no_learning_rate_at_all_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = None
    Guide(model, optimizer, Config(policy=fixed(SCALES), every=1, engagement="off"))
    with pytest.raises(InputError, match="has no learning rate of its own"):
        list(fit(model, optimizer, batches(1), squared_error))


# -- overrides of bitsandbytes ----------------------------------------------------------------


@pytest.fixture
def manager() -> Iterator[Any]:
    """The one for the whole process."""
    found = pytest.importorskip("bitsandbytes").optim.GlobalOptimManager.get_instance()
    found.initialize()
    yield found
    found.initialize()


def test_an_override_stays_with_its_parameter_when_groups_change(manager: Any) -> None:
    """bitsandbytes keeps them by place in the groups, and virtual groups change the places."""
    model = network()
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    optimizer = make("bitsandbytes-8bit", model.parameters())

    def later(situation: Any) -> Tensor:
        scale = (1.0, 0.0, 0.0) if situation.step < 2 else (0.0, 1.0, 1.0)
        return torch.tensor(scale, dtype=torch.float64)

    Guide(model, optimizer, Config(policy=Policy(later, False), every=2, always_train=()))
    list(fit(model, optimizer, batches(4), squared_error))
    kinds = [optimizer.state[model[i].weight]["state1"].dtype for i in (0, 2, 4)]
    assert kinds == [torch.float32, torch.uint8, torch.uint8]


def test_an_override_of_the_learning_rate_is_refused(manager: Any) -> None:
    model = network()
    manager.register_module_override(model[0], "weight", {"lr": 0.5})
    optimizer = make("bitsandbytes-8bit", model.parameters())
    Guide(model, optimizer, Config(policy=fixed(SCALES), every=2))
    with pytest.raises(InputError, match="drop 'lr' from the override"):
        list(fit(model, optimizer, batches(1), squared_error))
