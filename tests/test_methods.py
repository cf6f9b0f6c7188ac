"""Every method through every property: whatever is added to METHODS is tested here as it is."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops import counted_flops
from rgft import METHODS, Config, CostModel, FlopMeter, Guide, InputError, Method, Plan
from rgft.execution.galore import GaLoreAdamW, projected_weights
from rgft.methods import find_method
from tiny import (
    bert,
    bert_loss,
    bert_with,
    fit,
    optimizer_state,
    same_state,
    tokens,
    values,
)

STEPS = 20
FREEZES = {
    *("rgft-threshold", "linear-probing", "suffix", "random", "gradual-unfreezing", "bitfit"),
    *("lisa", "badam", "grass", "misa", "autofreeze", "greentrainer", "dropbp"),
}
# Plans under which backward stops above the embeddings in these runs; LoRA pairs in the first layer
# need the gradient down to it, but not below.
ADAPTED = {name for name, method in METHODS.items() if method.adapter}
TRUNCATES = (FREEZES - {"rgft-threshold", "bitfit", "lisa", "grass", "dropbp"}) | ADAPTED
# A head on random features, and biases of 0 that take the largest rate, learn slowly,
# and so do a few modules, or one layer at a time.
SLOW = {"linear-probing": 0.98, "auto-rgn": 0.99, "misa": 0.96, "badam": 0.98}
ENOUGH = {"misa": {"parameter_share": 0.2}}  # of a tiny model, for 20 steps to show
OFTEN = {"autofreeze": {"every": 2}}  # it has to see a few changes first
BYPASS = " with bypass"
ALL = [*sorted(METHODS), "random" + BYPASS, "rgft-threshold" + BYPASS]


def method_of(name: str) -> Method:
    """The method that a row of the table is about."""
    return METHODS[name.removesuffix(BYPASS)]


def config_of(method: str, **changes: Any) -> Config:
    """The method's own settings, with decisions often enough for a run of 20 steps."""
    config = method_of(method).config
    settings: dict[str, Any] = {"warmup": min(config.warmup, 2), "total_steps": STEPS}
    settings["every"] = min(config.every, 4)
    bypass = config.bypass or method.endswith(BYPASS)
    return replace(config, bypass=bypass, **(settings | ENOUGH.get(method, {}) | changes))


Started = tuple[nn.Module, torch.optim.Optimizer, Guide]


def started(method: str, **changes: Any) -> tuple[*Started, FlopMeter]:
    """Model, optimizer, guide and meter, the same at every call; with momentum and weight decay."""
    adapter = method_of(method).adapter
    model = bert() if adapter is None else bert_with(adapter)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(method, model, chosen)
    meter = FlopMeter(model)
    return (
        model,
        optimizer,
        Guide(model, optimizer, config_of(method, **changes), meter=meter),
        meter,
    )


def optimizer_of(
    method: str, model: nn.Module, chosen: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW, or what the method has in its place, renewing its subspaces in runs of 20 steps."""
    lr, projection = method_of(method).lr * 10, method_of(method).projection
    if projection is None:
        return torch.optim.AdamW(chosen, lr, weight_decay=0.1)
    small = replace(projection, rank=4, every=4)
    return GaLoreAdamW(chosen, projected_weights(model), small, lr=lr, weight_decay=0.1)


def start(method: str, **changes: Any) -> Started:
    """The same, but for the meter."""
    return started(method, **changes)[:3]


def with_probe(guide: Guide) -> Guide:
    assert guide._scoring.signal.source != "samples", "give the table's runs a probe"
    return guide


@pytest.fixture(autouse=True)
def strict() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("method", ALL)
def test_trains_and_says_nothing(method: str) -> None:
    model, optimizer, guide = start(method)
    with_probe(guide)
    losses = list(fit(model, optimizer, tokens() * STEPS, bert_loss))
    assert losses[-1] < losses[0] * SLOW.get(method, 0.9)
    assert guide.step == STEPS
    assert guide.error_map.to_pandas()["error"].gt(0).any()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("stop", [3, 9])
def test_resumes_bit_for_bit(method: str, stop: int) -> None:
    batches = tokens(14)
    whole, first, second = (start(method) for _ in range(3))
    list(fit(*whole[:2], batches, bert_loss))
    list(fit(*first[:2], batches[:stop], bert_loss))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    list(fit(*second[:2], batches[stop:], bert_loss))
    assert whole[2].plan == second[2].plan
    assert same_state(values(whole[0]), values(second[0]))
    assert same_state(optimizer_state(*whole[:2]), optimizer_state(*second[:2]))
    assert torch.equal(whole[2].error_map.values, second[2].error_map.values)


def frozen_names(guide: Guide) -> set[str]:
    """Parameters that the plan in force does not train."""
    trained = dict(zip((c.name for c in guide.plan.components), guide.plan.trained, strict=True))
    return {s.parameter for c in guide.plan.components if not trained[c.name] for s in c.slices}


@pytest.mark.parametrize("method", ALL)
def test_frozen_keeps_its_bits_and_trained_moves(method: str) -> None:
    model, optimizer, guide = start(method)
    adaptable = set(guide.binding.parameters)
    ever_frozen = 0
    for batch in tokens(STEPS):
        plan, frozen, trying = guide.plan, frozen_names(guide), guide.trying
        ever_frozen += bool(frozen)
        weights, state = values(model), optimizer_state(model, optimizer)
        list(fit(model, optimizer, [batch], bert_loss))
        after, state_after = values(model), optimizer_state(model, optimizer)
        for name in after:
            held = (name in frozen and not trying) or name not in adaptable
            same = torch.equal(after[name], weights[name])
            if held:
                assert same, name
                assert same_state(state_after[name], state[name]), name
            elif (
                name not in frozen
                and multiplier_of(guide, name, plan) > 0.01
                and not name.endswith("key.bias")
            ):
                assert not same, name  # attention does not depend on the key's bias
    assert bool(ever_frozen) == (method.removesuffix(BYPASS) in FREEZES)


def multiplier_of(guide: Guide, name: str, plan: Plan) -> float:
    """What the plan multiplies the rate of a whole parameter with."""
    index = guide.binding.pieces_of[guide.binding.parameters[name]][0]
    return plan.lr_scale[guide.binding.pieces[index].component]


def boundary_modules(model: nn.Module, guide: Guide, active: frozenset[str]) -> list[nn.Module]:
    """Layers (and embeddings) that lie below everything that requires a gradient."""
    depth = {s.parameter: c.depth for c in guide.components for s in c.slices}
    lowest = min(depth[name] for name in active)
    base: Any = model.base_model.model.bert if hasattr(model, "peft_config") else model.bert
    stack = [base.embeddings, *base.encoder.layer]
    return [module for i, module in enumerate(stack) if i < lowest]


# By raw norms thresholding keeps the lowest layers here; by norms per parameter the highest ones.
@pytest.mark.parametrize(
    ("method", "changes", "truncates"),
    [
        *((name, OFTEN.get(name, {}), name.removesuffix(BYPASS) in TRUNCATES) for name in ALL),
        ("rgft-threshold", {"signal": "rms", "top": 0.2}, True),
    ],
)
def test_backward_stops_where_the_plan_says_and_costs_what_is_predicted(
    method: str, changes: dict[str, Any], truncates: bool
) -> None:
    model, optimizer, guide, meter = started(method, **changes)
    meter.costs.graph(**tokens()[0])  # traced now, where torch does not count it
    predicted = CostModel(model)
    fired: list[str] = []
    for module_name, module in model.named_modules():
        if module_name.endswith(("embeddings", "layer.0", "layer.1", "layer.2")):
            module.register_forward_hook(tensor_hook(module_name, fired))
    stopped = 0
    for batch in tokens(12):
        fired.clear()
        active = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        assert guide.active == active
        below = boundary_modules(model, guide, active)
        names = {n for n, m in model.named_modules() if m in below}
        optimizer.zero_grad()
        if guide.config.bypass and guide.step == 0:
            model(**batch)  # the branches are looked for
        forward, backward = counted_flops(model, batch)
        assert not names & set(fired)
        assert (forward, backward) == cost_of(predicted, active, batch, meter.detached)
        if not guide.probing:
            frozen = frozen_names(guide)
            assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
            stopped += bool(below)
        optimizer.step()
    assert bool(stopped) == truncates


def tensor_hook(name: str, fired: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: fired.append(name))

    return hook


def cost_of(
    model: CostModel, active: frozenset[str], batch: dict[str, Tensor], detached: frozenset[str]
) -> tuple[int, int]:
    cost = model.graph(**batch).cost(active, detached=detached)
    return cost.forward, cost.backward


@pytest.mark.parametrize("method", ALL)
def test_leaves_groups_and_modules_as_they_were(method: str) -> None:
    model, optimizer, guide = start(method)
    before = copy.deepcopy(
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    )
    parameters = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    list(fit(model, optimizer, tokens(6), bert_loss))
    guide.close()
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == parameters
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == before
    assert all(p.requires_grad for p in guide.binding.parameters.values())
    assert not any(m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("method", ALL)
def test_has_a_summary_of_one_line_and_a_learning_rate(method: str) -> None:
    found = find_method(method.removesuffix(BYPASS))
    assert found.summary
    assert "\n" not in found.summary
    assert 0 < found.lr < 1


def test_an_unknown_method_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(InputError, match="unknown method 'nonsense'; allowed: rgft, ") as caught:
        find_method("nonsense")
    assert "\n" not in str(caught.value)
