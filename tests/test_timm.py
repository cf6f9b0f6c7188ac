"""Loops in the style of timm, with its models: by its own groups and multipliers, or by a count."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flops import ON_CPU
from rgft import Budget, Config, EngagementError, FlopMeter, Guide, Policy, Spending
from rgft.components import partition
from rgft.execution.prefix_cache import PrefixCache
from timm_loop import RESNET, ROWS, UPDATES, VIT, Loop, batches, loop_of, model_of, timm
from tiny import same_state, values

KINDS = [VIT, RESNET]


def fixed(scale: dict[str, float]) -> Policy:
    """Multipliers by name of the component."""

    def rule(situation: Any) -> Tensor:
        named = [scale.get(c.name, 1.0) for c in situation.components]
        return torch.tensor(named, dtype=torch.float64)

    return Policy(rule, uses_error=False, changes=False)


@pytest.mark.parametrize("kind", [*KINDS, "convnext_atto", "efficientnet_lite0"])
def test_layers_are_those_that_timm_knows(kind: str) -> None:
    """Its own rule, which layer-wise decay of learning rates goes by, tells the same ones apart."""
    model = model_of(kind)
    wanted = timm().models.group_parameters(model, model.group_matcher(coarse=False))
    group_of = {name: group for group, names in wanted.items() for name in names}
    layers = [c for c in partition(model, "layer") if c.kind == "layer"]
    groups = [{group_of[s.parameter] for s in layer.slices} for layer in layers]
    assert len(layers) > 2
    assert [len(group) for group in groups] == [1] * len(layers)
    assert len(set.union(*groups)) == len(layers)


@pytest.mark.parametrize("granularity", ["block", "head"])
def test_parts_of_layers_are_found(granularity: str) -> None:
    model = model_of()
    components = partition(model, granularity)
    kinds = {c.kind for c in components}
    assert {"feed_forward", "attention" if granularity == "block" else "attention_head"} <= kinds
    assert sum(c.numel for c in components) == sum(p.numel() for p in model.parameters())


# -- multipliers ------------------------------------------------------------------------------

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"parts": 2},
    "bf16": {"bf16": True},
    "layer-decay": {"layer_decay": 0.7},
    "sgd": {"opt": "momentum"},
    "lion": {"opt": "lion", "lr": 1e-3},
    "lamb": {"opt": "lamb"},
}


def groups_by_hand(model: nn.Module, optimizer: Any, scale: dict[str, float]) -> Any:
    """A group for each component and each of timm's groups, with a multiplier of timm's own."""
    named = dict(model.named_parameters())
    owner = {
        named[part.parameter]: component.name
        for component in partition(model, "layer")
        for part in component.slices
    }
    groups: list[dict[str, Any]] = []
    for real in optimizer.param_groups:
        for name in dict.fromkeys(owner[p] for p in real["params"]):
            times = scale.get(name, 1.0)
            for parameter in (held := [p for p in real["params"] if owner[p] == name]):
                parameter.requires_grad_(times > 0)
            part = {"params": held, "weight_decay": real["weight_decay"]}
            groups.append({**part, "lr_scale": real.get("lr_scale", 1.0) * times})
    return [group for group in groups if group["lr_scale"]]


def scales(kind: str) -> dict[str, float]:
    if kind == VIT:
        return {"embeddings": 0.0, "blocks.0": 0.5, "blocks.1": 0.0, "head": 2.0}
    return {"stem": 0.0, "layer1.0": 0.5, "layer3.0": 0.0, "fc": 2.0}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loop_with_multipliers_of_timms_own(kind: str, feature: str) -> None:
    """Its schedules multiply the rates of groups by their `lr_scale`."""
    scale, settings = scales(kind), FEATURES[feature]
    ours, theirs = model_of(kind), model_of(kind)
    loop = loop_of(ours, **settings)
    guide = Guide(ours, loop.optimizer, Config(policy=fixed(scale), every=2))
    by_hand = loop_of(theirs, **settings)
    groups = groups_by_hand(theirs, by_hand.optimizer, scale)
    by_hand = loop_of(theirs, groups, **{k: v for k, v in settings.items() if k != "layer_decay"})
    for one in (loop, by_hand):
        assert list(one.updates(batches()))[-1] == UPDATES
    guide.close()
    start = values(model_of(kind))
    moved, wanted = (
        {name for name, value in values(model).items() if not torch.equal(value, start[name])}
        for model in (ours, theirs)
    )
    assert moved == wanted
    assert 0 < len(moved) < len(start)
    for name, value in values(theirs).items():
        torch.testing.assert_close(values(ours)[name], value, rtol=1e-6, atol=1e-7)
    for name, value in by_hand.average.module.state_dict().items():
        found = loop.average.module.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)


# -- plans ------------------------------------------------------------------------------------


def guided(kind: str, model: Any = None, **settings: Any) -> tuple[Loop, Guide]:
    loop = loop_of(model_of(kind) if model is None else model, **settings)
    granularity = "block" if kind == VIT else "layer"
    config = Config(granularity=granularity, policy="top", top=0.3, every=2, warmup=2)
    return loop, Guide(loop.model, loop.optimizer, config)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plan_freezes_keeps_its_bits_and_costs_nothing(kind: str) -> None:
    """PyTorch's own counter sees each step cost what ours says."""
    loop, guide = guided(kind)
    meter = FlopMeter(loop.model)
    meter.costs.graph(batches(1)[0][0])  # else the first step's count has its tracing in it
    frozen_before: dict[str, Tensor] = {}
    updates = loop.updates(batches())
    frozen: set[str] = set()
    costs: list[int] = []
    while True:
        spent = meter.spent
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            done = next(updates, None)
        if done is None:
            break
        costs.append(meter.spent - spent)
        assert counter.get_total_flops() == pytest.approx(costs[-1], rel=0.01)
        weights = values(loop.model)
        assert all(torch.equal(weights[name], frozen_before[name]) for name in frozen)
        named = guide.binding.parameters
        frozen = set() if guide.probing else named.keys() - guide.active
        frozen_before = weights
    guide.close()
    assert len(costs) == UPDATES
    assert min(costs) < 0.9 * max(costs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_ends_it_near_its_share(kind: str) -> None:
    loop = loop_of(model_of(kind))
    spending = Spending(FlopMeter(loop.model), Budget(share=0.5), batches=60)
    config = Config(policy="top", top=0.3, every=2, warmup=2)
    guide = Guide(loop.model, loop.optimizer, config, spending=spending)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        model_of(kind)(batches(1)[0][0]).sum().backward()
    for _ in loop.updates(batches(60), spent=spending.step):
        if spending.finished:
            break
    guide.close()
    assert spending.meter.spent / (60 * counter.get_total_flops()) == pytest.approx(0.5, abs=0.02)
    assert 30 < guide.step < 60


def saved(parts: list[Any]) -> list[Any]:
    """As they come back from a file."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    found: list[Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run(kind: str) -> None:
    ends = []
    for stop in (UPDATES, 5):
        loop, guide = guided(kind)
        list(loop.updates(batches()[:stop]))
        parts = [loop.model, loop.optimizer, loop.scheduler, loop.average, guide]
        if stop < UPDATES:
            state = saved(parts)
            loop, guide = guided(kind)
            parts = [loop.model, loop.optimizer, loop.scheduler, loop.average, guide]
            for part, held in zip(parts, state, strict=True):
                part.load_state_dict(held)
            list(loop.updates(batches()[stop:], stop))
        guide.close()
        ends.append((guide.plan.lr_scale, [part.state_dict() for part in parts[:4]]))
    assert 0.0 in ends[0][0]
    assert same_state(ends[0], ends[1])


# -- features ---------------------------------------------------------------------------------


def ends_as(ours: Loop, theirs: Loop) -> None:
    for name, value in values(theirs.model).items():
        torch.testing.assert_close(values(ours.model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_stays_truncated(kind: str) -> None:
    seen: list[list[bool]] = []
    loops = []
    for checkpointed in (True, False):
        model = model_of(kind)
        model.set_grad_checkpointing(checkpointed)
        layer = next(c for c in partition(model, "layer") if c.kind == "layer").name
        seen.append([])
        loop = loop_of(model)
        config = Config(policy="suffix", top=0.4, every=2)
        guide = Guide(model, loop.optimizer, config)
        module = model.get_submodule(layer)
        found = seen[-1]
        module.register_forward_hook(lambda m, i, o, found=found: found.append(o.requires_grad))
        list(loop.updates(batches()))
        guide.close()
        loops.append(loop)
    ends_as(*loops)
    assert seen[0]
    assert not any(seen[0] + seen[1])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_noticed() -> None:
    """It is timm's own setting, so that the guide cannot see it before the first step."""
    timm().layers.set_reentrant_ckpt(True)
    try:
        model = model_of()
        model.set_grad_checkpointing(True)
        loop = loop_of(model)
        guide = Guide(model, loop.optimizer, Config(policy="suffix", top=0.4, every=2))
        with pytest.raises(EngagementError):
            list(loop.updates(batches()))
            guide.close()
    finally:
        timm().layers.set_reentrant_ckpt(False)


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_compiled_blocks() -> None:
    torch._dynamo.reset()
    loops = []
    for compiled in (True, False):
        model = model_of()
        if compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager")
        loop, guide = guided(VIT, model)
        list(loop.updates(batches()))
        guide.close()
        loops.append((loop, guide))
    assert loops[0][1].plan == loops[1][1].plan
    ends_as(loops[0][0], loops[1][0])


def test_prefix_cache() -> None:
    """ViT has neither dropout nor batch normalization here."""
    data = batches(2) * 4
    ends = []
    for cached in (True, False):
        loop = loop_of(model_of())
        config = Config(policy="normalized-max", every=2, frozen_below=2)
        guide = Guide(loop.model, loop.optimizer, config)
        if cached:
            loop.epoch = 2
            with PrefixCache(loop.model) as cache:
                cache.follow(guide.lowest)
                list(loop.updates(data))
            assert cache.counts["hits"] == 3 * 2 * ROWS
        else:
            list(loop.updates(data))
        guide.close()
        ends.append(loop)
    ends_as(*ends)
