"""The guided optimizer against the published update, written out by hand."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide, InputError, Policy, Situation, error_map
from tiny import (
    bert,
    bert_loss,
    fit,
    mlp,
    mlp_batches,
    optimizer_state,
    same_state,
    squared_error,
    tokens,
    values,
)

# -- the published loop, with nothing of the library in it ------------------------------------

# tests that freeze and decide at every step know what they do
pytestmark = pytest.mark.filterwarnings("ignore:every=1 with probe_every=1")


def component_of(name: str) -> int:
    return {"0": 0, "2": 1, "4": 2}[name.split(".", maxsplit=1)[0]]


def norm(gradients: list[Tensor], p: float) -> float:
    entries = [abs(x) for g in gradients for x in g.flatten().tolist()]
    return max(entries) if p == math.inf else sum(x**p for x in entries) ** (1 / p)


def rank_rule(error: list[float], alpha: float) -> list[float]:
    if max(error) == 0:
        return [1.0] * len(error)
    order = sorted(range(len(error)), key=lambda k: -error[k])
    rank = {k: r + 1 for r, k in enumerate(order)}  # no ties in these runs
    return [1 + alpha * (len(error) - rank[k]) / (len(error) - 1) for k in range(len(error))]


def top_rule(error: list[float], count: int) -> list[float]:
    """The head (component 2) always trains and does not compete."""
    if max(error) == 0:
        return [1.0] * 3
    best = sorted((0, 1), key=lambda k: -error[k])[:count]
    return [1.0 if k in best or k == 2 else 0.0 for k in range(3)]


def multipliers(policy: str, error: list[float], alpha: float) -> list[float]:
    if policy == "rank":
        return rank_rule(error, alpha)
    if policy == "top":
        return top_rule(error, 1)
    base = max(error) if policy == "normalized-max" else sum(error) / len(error)
    return [1 + alpha * e / base if base else 1.0 for e in error]


class HandSGD:
    """v <- mu v + (g + lambda theta), theta <- theta - eta v; torch's first v is the gradient."""

    def __init__(self, decay: Callable[[str], float], momentum: float) -> None:
        self.decay, self.momentum = decay, momentum
        self.velocity: dict[str, Tensor] = {}

    def step(self, name: str, theta: Tensor, g: Tensor, eta: float) -> Tensor:
        v = g + self.decay(name) * theta
        if self.momentum and name in self.velocity:
            v = self.momentum * self.velocity[name] + v
        self.velocity[name] = v
        return theta - eta * v


class HandAdamW:
    """Decoupled decay at the scaled rate, then Adam (Loshchilov & Hutter 2019)."""

    def __init__(self, decay: Callable[[str], float]) -> None:
        self.decay = decay
        self.moments: dict[str, tuple[int, Tensor, Tensor]] = {}

    def step(self, name: str, theta: Tensor, g: Tensor, eta: float) -> Tensor:
        t, m, v = self.moments.get(name, (0, torch.zeros_like(g), torch.zeros_like(g)))
        t, m, v = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        self.moments[name] = t, m, v
        corrected = (v / (1 - 0.999**t)).sqrt() + 1e-8
        return theta * (1 - eta * self.decay(name)) - eta * m / (1 - 0.9**t) / corrected


def by_hand(
    optimizer: HandSGD | HandAdamW, batches: list[Any], rates: list[float], config: Config
) -> Iterator[dict[str, Tensor]]:
    """Weights after each step of the published method."""
    model = mlp()
    error, scale = [0.0] * 3, [1.0] * 3
    for t, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        theta = values(model)
        names = list(theta)
        found = torch.autograd.grad(squared_error(model, batch), list(model.parameters()))
        gradients = dict(zip(names, found, strict=True))
        due = t % config.every == 0
        for k in range(3):
            if scale[k] > 0 or due:  # frozen components are probed when a decision falls
                own = [gradients[n] for n in names if component_of(n) == k]
                error[k] = config.beta * error[k] + (1 - config.beta) * norm(own, config.p)
        if due and not config.lag:
            scale = multipliers(str(config.policy), error, config.alpha)
        for name in names:
            if scale[component_of(name)] > 0:
                eta = rate * scale[component_of(name)]
                theta[name] = optimizer.step(name, theta[name], gradients[name], eta)
        if due and config.lag:
            scale = multipliers(str(config.policy), error, config.alpha)
        model.load_state_dict(theta)
        yield theta


def decay_of(name: str) -> float:
    return 0.0 if name.endswith("bias") else 0.1


def two_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    decayed = [p for n, p in model.named_parameters() if decay_of(n)]
    plain = [p for n, p in model.named_parameters() if not decay_of(n)]
    return [
        {"params": decayed, "lr": lr, "weight_decay": 0.1},
        {"params": plain, "lr": lr, "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], Callable[[], Any]]] = {
    "sgd": (lambda m: torch.optim.SGD(two_groups(m, 0.05)), lambda: HandSGD(decay_of, 0.0)),
    "momentum": (
        lambda m: torch.optim.SGD(two_groups(m, 0.05), momentum=0.9),
        lambda: HandSGD(decay_of, 0.9),
    ),
    "adamw": (lambda m: torch.optim.AdamW(two_groups(m, 0.05)), lambda: HandAdamW(decay_of)),
}
CASES = [
    *(("adamw", policy, 2, True, 1) for policy in ("normalized-sum", "rank", "top")),
    *(("momentum", policy, 2, True, 3) for policy in ("normalized-max", "rank", "top")),
    *((name, "normalized-max", 2, lag, 1) for name in OPTIMIZERS for lag in (True, False)),
    *(("sgd", "normalized-sum", p, lag, 3) for p in (1, math.inf) for lag in (True, False)),
    *(("adamw", "normalized-max", p, False, 3) for p in (1, math.inf)),
    ("adamw", "top", math.inf, True, 3),
    ("momentum", "top", 1, True, 1),
]


@pytest.mark.parametrize(("name", "policy", "p", "lag", "every"), CASES)
def test_every_step_is_the_published_update(
    name: str, policy: str, p: float, lag: bool, every: int
) -> None:
    settings = {"top": 0.5} if policy == "top" else {"alpha": 1.5}
    config = Config(
        policy=policy, p=p, lag=lag, every=every, beta=0.7, engagement="error", **settings
    )
    batches = mlp_batches(10)
    model = mlp()
    optimizer = OPTIMIZERS[name][0](model)
    guide = Guide(model, optimizer, config)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    rates = [0.05 * 0.8**t for t in range(10)]
    moved = values(model)
    plans = set()
    expected = by_hand(OPTIMIZERS[name][1](), batches, rates, config)
    for t, wanted in enumerate(expected):
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rates[t]] * 2, rel=1e-12)
        assert [len(g["params"]) for g in optimizer.param_groups] == [3, 3]
        list(fit(model, optimizer, [batches[t]], squared_error))
        plans.add(guide.plan.lr_scale)
        scheduler.step()
        for parameter, value in model.named_parameters():
            torch.testing.assert_close(value.detach(), wanted[parameter], rtol=1e-12, atol=1e-12)
    assert len(plans) > 1  # the plan did something
    assert not torch.equal(moved["4.weight"], model[4].weight)


# -- optimizers -------------------------------------------------------------------------------

EVERY_OPTIMIZER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-loop": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), foreach=False),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
}
MULTIPLIERS = (0.5, 0.0, 2.0)


def fixed(scale: tuple[float, ...]) -> Policy:
    return Policy(
        lambda _: torch.tensor(scale, dtype=torch.float64), uses_error=False, changes=False
    )


def groups_of(model: nn.Sequential, lr: float | None) -> list[dict[str, Any]]:
    """Real groups with the learning rates that the guide should produce; frozen ones left out."""
    return [
        {"params": list(model[i].parameters()), **({} if lr is None else {"lr": lr * m})}
        for i, m in zip((0, 2, 4), MULTIPLIERS, strict=True)
        if m > 0
    ]


def fresh_state(name: str) -> dict[str, dict[str, Any]]:
    model = mlp()
    return optimizer_state(model, EVERY_OPTIMIZER[name](model.parameters()))


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_virtual_groups_equal_real_groups_bit_for_bit(name: str) -> None:
    real, guided = mlp(), mlp()
    for parameter in real[2].parameters():
        parameter.requires_grad_(False)
    lr: Any = torch.tensor(0.01) if "tensor" in name else 0.01
    wanted = EVERY_OPTIMIZER[name](groups_of(real, lr))
    optimizer = EVERY_OPTIMIZER[name](guided.parameters())
    Guide(guided, optimizer, Config(policy=fixed(MULTIPLIERS), every=1))
    batches = mlp_batches(5)
    list(fit(real, wanted, batches, squared_error))
    list(fit(guided, optimizer, batches, squared_error))
    assert same_state(values(real), values(guided))
    trained, frozen = optimizer_state(guided, optimizer), fresh_state(name)
    for parameter, state in optimizer_state(real, wanted).items():
        assert same_state(trained[parameter], frozen[parameter] if "2." in parameter else state)


class ZerosForNone(torch.optim.SGD):
    """Takes a missing gradient for zeros, as the Muon of its author does (torch's does not)."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


def test_weight_decay_of_what_has_no_gradient_moves_nothing_that_is_frozen() -> None:
    model = mlp()
    optimizer = ZerosForNone(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    Guide(model, optimizer, Config(policy=fixed(MULTIPLIERS), every=1))
    before = values(model)
    list(fit(model, optimizer, mlp_batches(4), squared_error))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.weight", "0.bias", "4.weight", "4.bias"}


class GroupStepping(torch.optim.Optimizer):
    """Keeps state in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, key: str) -> None:
        super().__init__(params, {"lr": 0.1, "total": 0.0, "count": 0})
        self.key = key

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self.key == "total":
                group["total"] += group["lr"]
            elif self.key == "lr":
                group["lr"] = group["lr"] / 2
            else:
                group["count"] += 1
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad)


@pytest.mark.parametrize("key", ["total", "lr"])
def test_state_in_groups_that_depends_on_the_rate_is_refused(key: str) -> None:
    model = mlp()
    optimizer = GroupStepping(model.parameters(), key)
    Guide(model, optimizer, Config(policy=fixed((0.5, 1.0, 2.0)), every=1))
    with pytest.raises(InputError, match=f"GroupStepping writes '{key}'") as caught:
        list(fit(model, optimizer, mlp_batches(1), squared_error))
    assert "\n" not in str(caught.value)
    assert len(optimizer.param_groups) == 1  # the user's own groups are back
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_state_in_groups_that_does_not_depend_on_the_rate_is_kept() -> None:
    model = mlp()
    optimizer = GroupStepping(model.parameters(), "count")
    Guide(model, optimizer, Config(policy=fixed((0.5, 1.0, 2.0)), every=1))
    list(fit(model, optimizer, mlp_batches(3), squared_error))
    assert optimizer.param_groups[0]["count"] == 3


def test_a_closure_gives_what_the_loop_gives() -> None:
    outcomes = []
    for closed in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        guide = Guide(model, optimizer, Config(every=2))

        def closure(model=model, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = squared_error(model, mlp_batches(1)[0])
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            losses.append((optimizer.step(closure) if closed else closure()).item())
            if not closed:
                optimizer.step()
        outcomes.append((losses, values(model), guide.error_map.values, guide.plan.lr_scale))
    assert same_state(*outcomes)


def test_an_optimizer_that_evaluates_its_closure_again_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1)
    Guide(model, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = squared_error(model, mlp_batches(1)[0])
        loss.backward()
        return loss

    with pytest.raises(InputError, match="closure several times"):
        optimizer.step(closure)


class Clipping(torch.optim.SGD):
    """Calls its parent's step, whose hooks then run inside its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            torch.nn.utils.clip_grad_value_(group["params"], 10.0)
        super().step(closure)
        if self.state.pop("broken", None):
            raise RuntimeError("broken")


def test_a_step_inside_a_step_is_one_step() -> None:
    plain, nested = mlp(), mlp()
    guides = []
    for model, kind in ((plain, torch.optim.SGD), (nested, Clipping)):
        optimizer = kind(model.parameters(), 0.05, momentum=0.9)
        guides.append(Guide(model, optimizer, Config(every=2, policy="top", top=0.5)))
        list(fit(model, optimizer, mlp_batches(7), squared_error))
    assert same_state(values(plain), values(nested))
    assert [g.step for g in guides] == [7, 7]
    assert torch.equal(guides[0].error_map.values, guides[1].error_map.values)


def test_goes_on_after_a_step_that_failed() -> None:
    model = mlp()
    optimizer = Clipping(model.parameters(), 0.05)
    guide = Guide(model, optimizer, Config(every=1, policy="normalized-max"))
    for t, batch in enumerate(mlp_batches(6)):
        if t == 3:
            optimizer.state["broken"] = {"yes": True}
            with pytest.raises(RuntimeError, match="broken"):
                list(fit(model, optimizer, [batch], squared_error))
        else:
            list(fit(model, optimizer, [batch], squared_error))
    assert guide.step == 5
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_an_optimizer_of_nothing_and_no_optimizer_are_refused() -> None:
    model = mlp()
    with pytest.raises(InputError, match="holds no parameter"):
        Guide(model, torch.optim.SGD(mlp().parameters(), 0.1))
    with pytest.raises(InputError, match=r"torch\.optim\.Optimizer"):
        Guide(model, object())  # type: ignore[arg-type]


def test_the_optimizer_in_a_wrapper_is_found() -> None:
    model = mlp()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = mock.Mock(spec=["optimizer"], optimizer=inner)
    guide = Guide(model, wrapper, Config(every=1))
    list(fit(model, inner, mlp_batches(2), squared_error))
    assert guide.step == 2


# -- heads ------------------------------------------------------------------------------------

HEAD_SCALES = {0: 0.0, 1: 0.5, 2: 1.0, 3: 2.0}


def head_policy(situation: Situation) -> Tensor:
    return torch.tensor(
        [
            HEAD_SCALES[int(c.name.rsplit(".", 1)[1])] if c.kind == "attention_head" else 1.0
            for c in situation.components
        ],
        dtype=torch.float64,
    )


def head_multipliers(name: str, parameter: Tensor) -> Tensor:
    """The multiplier of each element: rows of q, k and v and columns of the output by head."""
    result = torch.ones_like(parameter)
    if ".attention.self." in name:
        for head, scale in HEAD_SCALES.items():
            result[head * 8 : head * 8 + 8] = scale
    elif name.endswith("attention.output.dense.weight"):
        for head, scale in HEAD_SCALES.items():
            result[:, head * 8 : head * 8 + 8] = scale
    return result


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_heads_are_updated_slice_by_slice(kind: str) -> None:
    dtype = torch.float64
    model, by_hand_model = bert(2, dtype), bert(2, dtype)
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), 1e-2, weight_decay=0.1
        )
        hand: Any = HandAdamW(lambda _: 0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, weight_decay=0.1)
        hand = HandSGD(lambda _: 0.1, 0.9)
    policy = Policy(head_policy, uses_error=False, changes=False)
    Guide(model, optimizer, Config(granularity="head", policy=policy, every=2))
    start = values(model)
    for batch in tokens(5):
        list(fit(model, optimizer, [batch], bert_loss))
        loss = bert_loss(by_hand_model, batch)
        theta = values(by_hand_model)
        found = torch.autograd.grad(loss, list(by_hand_model.parameters()))
        for (name, value), g in zip(theta.items(), found, strict=True):
            rate = 1e-2 * head_multipliers(name, value)
            theta[name] = hand.step(name, value, g, rate)
        by_hand_model.load_state_dict(theta, strict=False)
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.detach(), theta[name], rtol=1e-11, atol=1e-12)
    for name, value in model.named_parameters():
        frozen = head_multipliers(name, value) == 0
        assert torch.equal(value[frozen], start[name][frozen])
        for kept in optimizer.state[value].values():
            if isinstance(kept, Tensor) and kept.shape == value.shape:
                assert not kept[frozen].any()  # as it was before the first step


def test_a_head_that_freezes_later_keeps_its_state_bit_for_bit() -> None:
    def later(situation: Situation) -> Tensor:
        scale = head_policy(situation)
        return torch.ones_like(scale) if situation.step < 2 else scale

    model = bert(2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    Guide(model, optimizer, Config(granularity="head", policy=Policy(later, False), every=1))
    batches = tokens(5)
    list(fit(model, optimizer, batches[:2], bert_loss))
    weights, state = values(model), optimizer_state(model, optimizer)
    list(fit(model, optimizer, batches[2:], bert_loss))
    for name, value in model.named_parameters():
        scale = head_multipliers(name, value)
        assert torch.equal(value[scale == 0], weights[name][scale == 0])
        for key in ("exp_avg", "exp_avg_sq"):
            now = optimizer.state[value][key]
            assert torch.equal(now[scale == 0], state[name][key][scale == 0])
        if "self.query.weight" in name:
            assert (value != weights[name])[scale > 0].float().mean() > 0.99


# -- resuming ---------------------------------------------------------------------------------

RESUMED = [
    Config(policy="normalized-max", every=1),
    Config(policy="top", every=2, warmup=2, min_stay=3),
    Config(policy="random", every=2),
    Config(policy="rank", every=3, bias_correction=True, signal="random"),
    Config(policy="top", signal="relative", every=3, mean_one=True, history_rows=4),
    Config(policy="normalized-sum", signal="decrease", every=2, granularity="parameter"),
    Config(policy="gradual-unfreezing", every=1, total_steps=8),
]


@pytest.mark.parametrize("config", RESUMED, ids=lambda c: f"{c.policy}-{c.signal}-{c.every}")
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumes_bit_for_bit(config: Config, stop: int) -> None:
    batches = mlp_batches(11, torch.float32)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Guide, Any]:
        model = mlp(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        guide = Guide(model, optimizer, config)
        return model, optimizer, guide, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(parts: Any, chosen: list[Any]) -> None:
        for batch in chosen:
            list(fit(parts[0], parts[1], [batch], squared_error))
            parts[3].step()

    whole, first, second = start(), start(), start()
    train(whole, batches)
    train(first, batches[:stop])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert second[2].plan == first[2].plan
    assert second[2].active == first[2].active
    train(second, batches[stop:])
    for a, b in zip(whole, second, strict=True):
        assert same_state(nan_free(a.state_dict()), nan_free(b.state_dict()))


def nan_free(state: Any) -> Any:
    """NaN (not observed) as a number that compares equal to itself."""
    if isinstance(state, Tensor) and state.is_floating_point():
        return torch.nan_to_num(state, nan=-1.0)
    if isinstance(state, dict):
        return {key: nan_free(value) for key, value in state.items()}
    return state


def test_taking_the_state_does_not_disturb_the_run() -> None:
    models = [mlp(), mlp()]
    for model, looks in zip(models, (False, True), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        guide = Guide(model, optimizer, Config(policy="random", every=2))
        for _ in fit(model, optimizer, mlp_batches(6), squared_error):
            if looks:
                copy.deepcopy(guide.state_dict())
                guide.error_map.to_pandas()
    assert same_state(values(models[0]), values(models[1]))


def test_the_state_of_another_partition_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(granularity="parameter"))
    state = guide.state_dict()
    guide.close()
    other = Guide(model, optimizer, Config(granularity="layer"))
    with pytest.raises(InputError, match="this state has 6 components") as caught:
        other.load_state_dict(state)
    assert "\n" not in str(caught.value)


# -- when it decides --------------------------------------------------------------------------


def plans_over(config: Config, steps: int) -> list[tuple[float, ...]]:
    """The multipliers that each step was taken with."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    guide = Guide(model, optimizer, config)
    plans = []
    for batch in mlp_batches(steps):
        plans.append(guide.plan.lr_scale)
        list(fit(model, optimizer, [batch], squared_error))
    return plans


def test_warmup_trains_all_and_every_holds_a_plan() -> None:
    plans = plans_over(Config(policy="random", warmup=4, every=3, top=0.5), 16)
    assert plans[:4] == [(1.0, 1.0, 1.0)] * 4
    for start in range(4, 16, 3):
        assert len(set(plans[start : start + 3])) == 1
        assert sum(plans[start]) == 2  # the head and one of the two others
    assert len(set(plans[4:])) == 2


def test_min_stay_keeps_a_component_in_its_state() -> None:
    free = plans_over(Config(policy="random", every=1, top=0.5), 40)
    held = plans_over(Config(policy="random", every=1, top=0.5, min_stay=5), 40)

    def shortest(plans: list[tuple[float, ...]], k: int) -> int:
        switches = [t for t in range(1, 40) if plans[t][k] != plans[t - 1][k]]
        assert len(switches) > 2
        return min(b - a for a, b in pairwise(switches))

    assert shortest(free, 0) == 1
    assert min(shortest(held, 0), shortest(held, 1)) >= 5


@pytest.mark.parametrize("probe_every", [0, 1, 2])
def test_a_frozen_component_comes_back_only_if_it_is_probed(probe_every: int) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    config = Config(policy="top", top=0.5, every=2, beta=0.5, probe_every=probe_every)
    guide = Guide(model, optimizer, config)
    history = []
    for t in range(16):
        favourite = 0 if t < 4 else 2  # afterwards the other component has the large gradients
        optimizer.zero_grad()
        weights = {i: 100.0 if i == favourite else 1.0 for i in (0, 2)}
        loss = sum(weights[i] * model[i].weight.sum() for i in (0, 2)) + model[4].weight.sum()
        active = guide.active
        loss.backward()
        optimizer.step()
        probed = (t + 1) % 2 == 0 and probe_every and ((t + 1) // 2) % probe_every == 0
        if t >= 2:
            assert len({n.split(".")[0] for n in active}) == (3 if probed else 2)
        history.append(guide.plan.trained[:2])
    assert history[3] == (True, False)
    # Not probed, the frozen component keeps a low value; the trained one falls to its new level.
    assert history[-1] == ((False, True) if probe_every else (True, False))
    scores = guide.error_map.to_pandas().pivot(index="step", columns="component", values="score")
    seen = scores["2"].notna().sum()
    assert seen == {0: 2, 1: 16, 2: 16}.get(probe_every, 0) or 2 < seen < 16


def test_gradients_of_probed_components_are_never_applied() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    guide = Guide(model, optimizer, Config(policy="top", top=0.5, every=1))
    list(fit(model, optimizer, mlp_batches(1), squared_error))
    for batch in mlp_batches(8)[1:]:
        frozen = [i for i, on in zip((0, 2, 4), guide.plan.trained, strict=True) if not on]
        assert frozen
        assert guide.probing
        assert len(guide.active) == 6
        before = values(model)
        list(fit(model, optimizer, [batch], squared_error))
        for i in frozen:
            assert torch.equal(model[i].weight, before[f"{i}.weight"])


@pytest.mark.parametrize("make", [mlp, bert])
def test_where_only_a_step_can_score_a_probe_is_a_step_of_all(make: Any) -> None:
    """What is frozen moves in these steps alone, and the engagement check takes no offence."""
    model = make()
    batches, loss = (mlp_batches(12), squared_error) if make is mlp else (tokens(12), bert_loss)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    config = Config(policy="top", signal="improvement", every=3, top=0.3, beta=0.0)
    guide = Guide(model, optimizer, config)
    tried = 0
    for batch in batches:
        frozen = {s.parameter for c in guide.components if not guide.plan[c.name] for s in c.slices}
        trying, before = guide.trying, values(model)
        list(fit(model, optimizer, [batch], loss))
        moved = {n for n, value in values(model).items() if not torch.equal(value, before[n])}
        tried += trying
        assert moved & frozen == (frozen if trying else set())
        if trying:
            scores = guide.error_map.to_pandas()
            latest = scores[scores["step"] == guide.step]
            assert latest["score"].notna().all()
    assert tried == 3
    guide.close()


def test_an_optimizer_takes_one_guide_at_a_time() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    guide = Guide(model, optimizer)
    with pytest.raises(InputError, match="already has a guide"):
        Guide(model, optimizer)
    guide.close()
    Guide(model, optimizer)


@pytest.mark.parametrize("signal", ["taylor", "relative", "rms", "constant"])
def test_every_signal_goes_with_a_policy_that_freezes(signal: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    guide = Guide(model, optimizer, Config(policy="top", signal=signal, every=2, top=0.5))
    list(fit(model, optimizer, mlp_batches(9), squared_error))
    assert not all(guide.plan.trained)


def test_a_policy_that_is_asked_once_is_asked() -> None:
    asked: list[int] = []

    def rule(situation: Situation) -> Tensor:
        asked.append(situation.step)
        return 1 + situation.error / situation.error.max()

    for warmup, when in ((0, 2), (3, 3)):
        asked.clear()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        config = Config(policy=Policy(rule, changes=False), every=2, warmup=warmup)
        guide = Guide(model, optimizer, config)
        list(fit(model, optimizer, mlp_batches(9), squared_error))
        assert asked == [when]
        assert max(guide.plan.lr_scale) == 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda s: torch.full_like(s.error, math.nan), "finite"),
        (lambda s: torch.full_like(s.error, math.inf), "finite"),
        (lambda s: -torch.ones_like(s.error), "finite"),
        (lambda s: torch.ones(1), "one finite number"),
        (lambda s: torch.zeros_like(s.error), "freezes every component"),
    ],
)
def test_impossible_multipliers_are_refused(rule: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(InputError, match=message) as caught:
        Guide(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            Config(policy=Policy(rule, uses_error=False), always_train=()),
        )
    assert "\n" not in str(caught.value)


def test_new_heads_train_whatever_the_policy_says() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nothing = Policy(lambda s: torch.zeros_like(s.error), uses_error=False)
    guide = Guide(model, optimizer, Config(policy=nothing))
    assert [c.kind for c, s in zip(guide.components, guide.plan.lr_scale, strict=True) if s] == [
        "head"
    ]


def test_probing_at_each_step_is_told_to_save_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Guide(model, optimizer, Config(policy="top", every=1))
    with pytest.warns(RuntimeWarning, match="freezing saves no compute"):
        list(fit(model, optimizer, mlp_batches(2), squared_error))


def test_a_step_that_fails_leaves_the_real_groups_to_checkpoints() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Guide(model, optimizer, Config(policy="layerwise-decay"))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError))
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert len(optimizer.param_groups) > 1
    assert len(optimizer.state_dict()["param_groups"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "suffix", "lag": False}, "lag=False cannot freeze"),
        ({"policy": "nonsense"}, "unknown policy 'nonsense'"),
        ({"signal": "nonsense"}, "unknown signal 'nonsense'"),
        ({"policy": "gradual-unfreezing"}, "total_steps"),
        ({"signal": "fisher"}, "probe"),
        ({"signal": "decrease", "lag": False}, "lag=False"),
        ({"granularity": "head"}, "granularity"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(InputError, match=message) as caught:
        Guide(model, torch.optim.SGD(model.parameters(), 0.1), Config(**settings))
    assert "\n" not in str(caught.value)


def test_close_gives_everything_back() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(policy="head-only"))
    assert len(guide.active) == 2
    guide.close()
    assert all(p.requires_grad for p in model.parameters())
    plain = mlp()
    list(fit(model, optimizer, mlp_batches(3), squared_error))
    other = torch.optim.SGD(plain.parameters(), 0.1)
    list(fit(plain, other, mlp_batches(3), squared_error))
    assert same_state(values(model), values(plain))


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_of_the_map() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    guide = Guide(model, optimizer, Config(every=3, engagement="off"))
    whole = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match="1 of 3 steps"):
        for t, batch in enumerate(mlp_batches(3)):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            if t == 1:
                model[2].weight.grad[0, 0] = math.nan  # type: ignore[index]
            optimizer.step()
            model.load_state_dict(whole)
    assert torch.isfinite(guide.error_map.values).all()
    assert (guide.error_map.values > 0).all()


# -- waiting for the device -------------------------------------------------------------------

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


def count_reads(config: Config, steps: int) -> list[tuple[int, int]]:
    """For each optimizer step (transfers by the one place for them, by anything else)."""
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, foreach=True)
    guide = Guide(model, optimizer, config)
    counts = {"sent": 0, "other": 0}
    inside = False
    real = error_map.to_host

    def to_host(tensor: Tensor) -> Tensor:
        nonlocal inside
        counts["sent"] += 1
        inside = True
        return real(tensor)  # what follows in this step works on host memory

    def spy(method: str) -> Any:
        original = getattr(Tensor, method)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not inside:
                counts["other"] += 1
            return original(self, *args, **kwargs)

        return read

    result = []
    patches = [mock.patch.object(Tensor, name, spy(name)) for name in READS]
    for batch in mlp_batches(steps, torch.float32):
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        counts.update(sent=0, other=0)
        inside = False
        with mock.patch.object(error_map, "to_host", to_host):
            for patch in patches:
                patch.start()
            try:
                optimizer.step()
            finally:
                for patch in patches:
                    patch.stop()
        result.append((counts["sent"], counts["other"]))
    assert guide.step == steps
    return result


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    ("policy", "lag"),
    [
        *(
            (policy, lag)
            for policy in ("normalized-max", "rank", "uniform")
            for lag in (True, False)
        ),
        ("top", True),  # what freezes needs lag
    ],
)
def test_the_device_is_waited_for_once_per_decision(every: int, policy: str, lag: bool) -> None:
    counts = count_reads(Config(every=every, policy=policy, lag=lag), 12)
    assert counts == [(1 if t % every == 0 else 0, 0) for t in range(1, 13)]
