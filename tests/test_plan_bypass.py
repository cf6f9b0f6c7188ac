"""Plans with a bypass: what is frozen costs no backward, and nothing that trains starves."""

from __future__ import annotations

import copy
import io
import warnings
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from families import BATCHES, FAMILIES, with_lora
from flops import ON_CPU, result
from rgft import (
    Budget,
    Bypass,
    Config,
    CostModel,
    FlopMeter,
    Guide,
    InputError,
    Policy,
    Spending,
    partition,
    residual_branches,
)
from rgft.components import Component
from rgft.costs import component_costs
from rgft.execution.prefix_cache import PrefixCache
from rgft.policies.purchase import purchase
from rgft.structure.openers import openers
from tiny import bert, bert_loss, bert_with_lora, mlp, optimizer_state, same_state, tokens, values

# trains the first layer and the head alone: what lies between is frozen above the lowest trained
ENDS_TRAIN = Policy(
    lambda s: ((s.depth == 1) | s.always).double(), uses_error=False, changes=False, freezes=True
)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        bert_loss(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings("ignore:bypass=True did nothing in this run")
@pytest.mark.parametrize("policy", ["top", "bottom", "random", "purchase"])
def test_counted_flops_are_those_that_torch_sees(policy: str, granularity: str, lora: bool) -> None:
    """The search for the branches, probes and bypassed steps: to the last FLOP."""
    model = bert_with_lora() if lora else bert()
    optimizer, meter = sgd(model), FlopMeter(model)
    rate = {"rate": 0.7} if policy == "purchase" else {"top": 0.5}
    config = Config(policy=policy, every=2, bypass=True, granularity=granularity, **rate)
    spending = Spending(meter, Budget(share=1.0), batches=50)
    guide = Guide(model, optimizer, config, spending=spending)
    meter.costs.graph(**tokens()[0])  # traced now, where torch does not count it
    fewer, probed = 0, 0
    for batch in tokens(9):
        optimizer.zero_grad()
        before = meter.spent
        bypassed, probing = guide.bypassed, guide.probing
        probed += probing
        assert not (probing and bypassed)
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            bert_loss(model, batch).backward()
        assert counter.get_total_flops() == meter.spent - before
        plain = meter.costs.graph(**batch).cost(guide.active).total
        fewer += meter.spent - before < plain
        optimizer.step()
        spending.step()
    guide.close()
    assert not meter.detached
    assert probed == (0 if policy == "random" else 3)
    assert fewer or policy != "random"


def test_gradients_are_those_of_a_bypass() -> None:
    model = bert(4)
    guide = Guide(model, sgd(model), Config(policy=ENDS_TRAIN, bypass=True))
    names = [f"bert.encoder.layer.{i}" for i in (1, 2, 3)]
    (batch,) = tokens()
    assert guide.bypassed == ()  # nothing is known of the model yet
    bert_loss(model, batch).backward()
    assert guide.bypassed == tuple(names)
    twin = bert(4)
    components = partition(twin, "layer")
    branches = residual_branches(twin, components, lambda m: m(**batch))
    Bypass(twin, branches).set(names)
    bert_loss(twin, batch).backward()
    other = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if name in guide.active:
            expected = other[name].grad
            assert parameter.grad is not None and expected is not None
            assert torch.equal(parameter.grad, expected)
        else:
            assert parameter.grad is None
    guide.close()


def test_nothing_flows_in_bypassed_branches() -> None:
    model = bert(4)
    optimizer = sgd(model)
    guide = Guide(model, optimizer, Config(policy=ENDS_TRAIN, bypass=True))
    fired: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            del module, args
            if output.requires_grad:
                output.register_hook(lambda _: fired.append(name))

        return hook

    for name, module in model.named_modules():
        if name.endswith("intermediate.dense"):
            module.register_forward_hook(watch(name))
    train(model, optimizer, tokens(3))
    assert set(fired) == {"bert.encoder.layer.0.intermediate.dense"}
    guide.close()
    fired.clear()
    train(model, optimizer, tokens(1))
    assert len(fired) == 4


@pytest.mark.parametrize("stop", [1, 3, 7])
@pytest.mark.parametrize("policy", ["purchase", "top"])
def test_resumes_bit_for_bit(policy: str, stop: int) -> None:
    batches = tokens(12)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Guide, Spending]:
        model = bert()
        optimizer = sgd(model)
        spending = Spending(FlopMeter(model), Budget(share=1.0), batches=40)
        rate = {"rate": 0.5, "rate_end": 0.8} if policy == "purchase" else {}
        config = Config(policy=policy, every=2, bypass=True, **rate)
        return model, optimizer, Guide(model, optimizer, config, spending=spending), spending

    def run(parts: Any, chosen: list[Any]) -> None:
        for batch in chosen:
            train(parts[0], parts[1], [batch])
            parts[3].step()

    whole, first, second = start(), start(), start()
    run(whole, batches)
    run(first, batches[:stop])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(second, batches[stop:])
    assert whole[2].bypassed == second[2].bypassed
    assert whole[2].plan == second[2].plan
    assert whole[3].meter.spent == second[3].meter.spent
    assert same_state(values(whole[0]), values(second[0]))
    assert same_state(optimizer_state(*whole[:2]), optimizer_state(*second[:2]))


def test_per_sample_scores_are_exact() -> None:
    """Frozen components are scored by the probe as without a bypass."""
    model = bert()
    (batch,) = tokens()
    seen: list[tuple[str, ...]] = []

    def probe(count: int) -> Any:
        for i in range(min(count, 4)):
            seen.append(guide.bypassed)
            yield bert_loss(model, {k: v[i : i + 1] for k, v in batch.items()})

    config = Config(policy="random", signal="fisher", every=2, top=0.3, bypass=True, seed=3)
    optimizer = sgd(model)
    guide = Guide(model, optimizer, config, probe=probe)
    steps = []
    for _ in range(8):
        train(model, optimizer, [batch])
        steps.append(guide.bypassed)
    assert any(steps)
    assert set(seen) == {()}
    assert bool((guide.error_map.values > 0).all())
    guide.close()


def test_a_copy_is_no_part_of_it() -> None:
    model = bert()
    optimizer = sgd(model)
    guide = Guide(model, optimizer, Config(policy=ENDS_TRAIN, bypass=True))
    twin = copy.deepcopy(model)
    (batch,) = tokens()
    bert_loss(twin, batch).backward()
    assert guide.bypassed == ()
    train(model, optimizer, [batch])
    assert guide.bypassed
    guide.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluation_comes_first() -> None:
    model = bert().eval()
    optimizer = sgd(model)
    guide = Guide(model, optimizer, Config(policy=ENDS_TRAIN, bypass=True))
    (batch,) = tokens()
    with torch.no_grad():
        bert_loss(model, batch)
    assert guide.bypassed == ()
    train(model.train(), optimizer, [batch])
    assert guide.bypassed
    guide.close()


def test_beside_a_prefix_cache() -> None:
    """The search passes the cache by; weights are those without it."""
    always = Policy(
        lambda s: ((s.depth == 2) | s.always).double(),
        uses_error=False,
        changes=False,
        freezes=True,
    )
    (batch,) = tokens()
    ends = []
    for cached in (False, True):
        model = bert(4)
        optimizer = sgd(model)
        guide = Guide(model, optimizer, Config(policy=always, bypass=True))
        with PrefixCache(model) as cache:
            for _ in range(3):
                optimizer.zero_grad()
                if cached:
                    cache.follow(guide.lowest)
                names = {"sample_ids": list("abcd")} if cached else {}
                model(**batch, **names).loss.backward()
                optimizer.step()
            assert cache.use.hits == (8 if cached else 0)
        assert guide.bypassed[-1] == "bert.encoder.layer.3"
        guide.close()
        ends.append(values(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["uniform", "normalized-max", Policy(lambda s: s.error + 1)])
def test_a_policy_that_freezes_nothing(policy: Any) -> None:
    model = bert()
    with pytest.raises(InputError, match="bypass=True has no effect, since the policy freezes"):
        Guide(model, sgd(model), Config(policy=policy, bypass=True))


def test_a_model_without_branches() -> None:
    model = mlp()
    guide = Guide(model, sgd(model), Config(policy="random", bypass=True))
    with pytest.raises(InputError, match="no component of this model can be bypassed") as caught:
        model(torch.zeros(2, 5, dtype=torch.float64))
    assert "\n" not in str(caught.value)
    guide.close()


@pytest.mark.parametrize("policy", ["suffix", "head-only"])
def test_a_run_without_any_bypass_says_so(policy: str) -> None:
    model = bert()
    optimizer = sgd(model)
    guide = Guide(model, optimizer, Config(policy=policy, bypass=True))
    train(model, optimizer, tokens(3))
    with pytest.warns(RuntimeWarning, match="bypass=True did nothing in this run"):
        guide.close()


def test_a_run_with_one_says_nothing() -> None:
    model = bert()
    optimizer = sgd(model)
    guide = Guide(model, optimizer, Config(policy=ENDS_TRAIN, bypass=True))
    train(model, optimizer, tokens(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.close()


def subsets(items: list[Any]) -> Any:
    sizes = range(1, len(items) + 1)
    return chain.from_iterable(combinations(items, size) for size in sizes)


CASES = [
    ("bert", "layer"),
    ("bert", "block"),
    ("gpt2", "block"),
    ("t5", "layer"),
    ("bart", "layer"),
    ("resnet", "layer"),
    ("llama", "block"),
    ("lora", "layer"),
]


def case(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "lora":
        return with_lora(FAMILIES["bert"]()), BATCHES["bert"]()
    return FAMILIES[name](), BATCHES[name]()


def owners_in(components: list[Component]) -> dict[str, list[str]]:
    return {part.parameter: [c.name] for c in components for part in c.slices}


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_all_plans_train_what_they_say_at_the_price_they_say(name: str, granularity: str) -> None:
    """Every set of components: the costs by component, and that nothing trained starves."""
    model, batch = case(name)
    components = list(partition(model, granularity))[-9:]
    branches = residual_branches(model, partition(model, granularity), lambda m: m(**batch))
    needed = openers(branches, owners_in(list(partition(model, granularity))))
    names = [c.name for c in components]
    mine = {n: needed[n] for n in names if n in needed}
    index = {name: i for i, name in enumerate(names)}
    prefix = "base_model.model." if name == "lora" else ""
    gates: dict[str, list[int]] = {}
    for n, opening in mine.items():
        bits = sum(1 << index[o] for o in opening if o in index)
        for path in branches.modules[n]:
            gates.setdefault(prefix + path, []).append(bits)
    graph = CostModel(model).graph(**batch)
    costs = component_costs([graph], components, gates=gates)
    assert not branches.without_gradient(())
    saved = 0
    for chosen in subsets(components):
        on = {c.name for c in chosen}
        trained = {s.parameter for c in chosen for s in c.slices}
        off = [n for n in mine if on.isdisjoint(mine[n])]
        detached = [prefix + path for path in branches.of(off)]
        exact = graph.cost(trained, detached=detached).total
        assert costs.cost([index[n] for n in on]) == exact
        saved += exact < graph.cost(trained).total
        assert not branches.without_gradient(off) & trained
    assert saved


class Counting:
    """FLOPs of a step by torch itself, with a real bypass."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], components: list[Any]) -> None:
        self.model, self.batch, self.components = model, batch, components
        self.branches = residual_branches(model, components, lambda m: m(**batch))
        self.bypass = Bypass(model, self.branches)

    def __call__(self, trained: set[int]) -> int:
        frozen = [c.name for i, c in enumerate(self.components) if i not in trained]
        on = {s.parameter for i in trained for s in self.components[i].slices}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in on)
        self.bypass.set([name for name in frozen if name in self.branches.modules])
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            loss = result(self.model(**self.batch))
            if loss.requires_grad:
                loss.backward()
        return int(counter.get_total_flops())


def test_purchases_are_priced_as_torch_counts_them() -> None:
    """What a guide believes steps to cost, for every plan of a model of four layers."""
    model = bert(4)
    spending = Spending(FlopMeter(model), Budget(share=1.0), batches=40)
    config = Config(policy="purchase", rate=0.5, bypass=True, probe_every=0, every=2)
    optimizer = sgd(model)
    guide = Guide(model, optimizer, config, spending=spending)
    batches = tokens(5)
    train(model, optimizer, batches)
    bypass = guide._enforcement.bypass
    assert bypass is not None
    costs = guide._planning.costs(bypass.gates)
    assert costs is not None and costs.jointly
    assert costs.cost([i for i, on in enumerate(guide.plan.trained) if on]) <= 0.5
    values_ = guide.error_map.values.tolist()
    guide.close()
    counting = Counting(model, batches[0], list(guide.components))
    full = counting(set(range(len(guide.components))))
    best, head = 0.0, len(guide.components) - 1
    for chosen in subsets(list(range(len(guide.components)))):
        if head in chosen:  # it always trains
            share = counting(set(chosen)) / full
            assert costs.cost(chosen) == pytest.approx(share, rel=1e-12)
            if share <= 0.5:
                best = max(best, sum(values_[i] for i in chosen))
    chosen = purchase(values_, costs, 0.5, {head})
    assert sum(values_[i] for i in chosen) == pytest.approx(best, rel=1e-12)
