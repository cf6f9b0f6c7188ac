"""The engagement check: it trips when a plan is defeated, says by what, and is quiet otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, EngagementError, Guide, Plan, Policy, Situation
from rgft.execution import engagement
from slicings import DTYPES, random_binding, random_gradients
from tiny import (
    bert,
    bert_loss,
    bert_with_lora,
    checkpoint_activations,
    fit,
    mlp,
    mlp_batches,
    squared_error,
    tokens,
)

SUFFIX = {"policy": "suffix", "top": 0.4, "every": 3}  # the pooler and the last of three layers

# tests that freeze and decide at every step know what they do
pytestmark = pytest.mark.filterwarnings("ignore:every=1 with probe_every=1")


def guided(model: nn.Module, **settings: Any) -> tuple[torch.optim.Optimizer, Guide]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    if "policy" not in settings:
        settings = SUFFIX | settings
    return optimizer, Guide(model, optimizer, Config(**({"every": 3} | settings)))


# -- ways to defeat a plan --------------------------------------------------------------------


def input_gradients(model: Any, optimizer: Any) -> Callable[[], None]:
    del optimizer
    model.enable_input_require_grads()
    return lambda: None


def hidden_states_that_require_gradients(model: Any, optimizer: Any) -> Callable[[], None]:
    del optimizer
    model.bert.encoder.layer[0].register_forward_hook(lambda m, a, out: out.requires_grad_())
    return lambda: None


def unfreezing(model: Any, optimizer: Any) -> Callable[[], None]:
    del optimizer
    return lambda: model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)


def unfreezing_in_the_middle(model: Any, optimizer: Any) -> Callable[[], None]:
    del optimizer
    return lambda: model.bert.embeddings.word_embeddings.weight.requires_grad_(True)


def second_optimizer(model: Any, optimizer: Any) -> Callable[[], None]:
    weight = model.bert.encoder.layer[1].output.dense.weight
    other = torch.optim.SGD([weight], 0.1)

    def moves(*_: Any) -> None:
        weight.grad = torch.ones_like(weight)
        other.step()
        weight.grad = None

    optimizer.register_step_post_hook(moves)
    return lambda: None


def reentrant_checkpointing(model: Any, optimizer: Any) -> Callable[[], None]:
    del optimizer
    checkpoint_activations(model, use_reentrant=True)
    model.disable_input_require_grads()
    return lambda: None


def lost_gradients(model: Any, optimizer: Any) -> Callable[[], None]:
    del model
    optimizer.register_step_pre_hook(lambda *_: optimizer.zero_grad())
    return lambda: None


DEFEATS: dict[Callable[..., Callable[[], None]], str] = {
    input_gradients: "output of frozen 'bert.embeddings.* requires a gradient",
    hidden_states_that_require_gradients: "output of frozen 'bert.encoder.layer.[01].* requires",
    unfreezing: r"bert\.encoder\.layer\.0\.output\.dense",
    unfreezing_in_the_middle: r"bert\.embeddings\.",
    second_optimizer: r"frozen parameter 'bert.encoder.layer.1.output.dense.weight' changed",
    reentrant_checkpointing: r"no gradient reached.*'bert.encoder.layer.2'.*use_reentrant=False",
    lost_gradients: "no trained parameter moved",
}


def run(model: nn.Module, optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> None:
    for batch in tokens(6):
        act()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            list(fit(model, optimizer, [batch], bert_loss))


@pytest.mark.parametrize("defeat", DEFEATS, ids=lambda d: d.__name__)
def test_trips_and_names_the_culprit(defeat: Callable[..., Callable[[], None]]) -> None:
    model = bert()
    optimizer, _ = guided(model)
    act = defeat(model, optimizer)
    with pytest.raises(EngagementError, match=DEFEATS[defeat]) as caught:
        run(model, optimizer, act)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the plan was not carried out: ")


@pytest.mark.parametrize("defeat", DEFEATS, ids=lambda d: d.__name__)
def test_warns_if_told_to(defeat: Callable[..., Callable[[], None]]) -> None:
    model = bert()
    optimizer, guide = guided(model, engagement="warn")
    act = defeat(model, optimizer)
    with pytest.warns(RuntimeWarning, match=DEFEATS[defeat]) as caught:
        run(model, optimizer, act)
    told = [w for w in caught if "the plan was not carried out" in str(w.message)]
    assert len(told) == 1  # once a plan, not once a step
    assert guide.step == 6


@pytest.mark.parametrize("defeat", DEFEATS, ids=lambda d: d.__name__)
def test_says_nothing_if_off(defeat: Callable[..., Callable[[], None]]) -> None:
    model = bert()
    optimizer, guide = guided(model, engagement="off")
    run(model, optimizer, defeat(model, optimizer))
    assert guide.step == 6
    assert not guide._engagement._handles


# -- healthy runs -----------------------------------------------------------------------------


def switching(situation: Situation) -> Tensor:
    """Another set at each decision, so that the check starts anew at each."""
    scale = torch.ones_like(situation.error)
    scale[situation.step // 2 % (len(scale) - 1)] = 0.0
    scale[0] = 0.0
    return scale


@pytest.mark.parametrize("granularity", ["layer", "block", "head", "parameter", "layer.\\d|rest"])
@pytest.mark.parametrize("name", ["bert", "lora"])
def test_quiet_when_plans_change_all_the_time(granularity: str, name: str) -> None:
    model = bert() if name == "bert" else bert_with_lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    policy = Policy(switching, uses_error=False)
    guide = Guide(model, optimizer, Config(granularity=granularity, policy=policy, every=2))
    list(fit(model, optimizer, tokens(12), bert_loss))
    assert not all(guide.plan.trained)


def test_quiet_on_a_component_that_spans_layers_above_and_below_the_boundary() -> None:
    """Frozen attentions above a trained layer do, rightly, pass a gradient on."""
    model = bert()

    def group(name: str, _: nn.Parameter) -> str:
        if "attention" in name:
            return "attentions"
        return "trained" if "layer.1" in name or "classifier" in name else "other"

    def rule(situation: Situation) -> Tensor:
        return torch.tensor([float(c.name == "trained") for c in situation.components])

    policy = Policy(rule, uses_error=False, changes=False)
    optimizer, guide = guided(model, policy=policy, granularity=group)
    list(fit(model, optimizer, tokens(6), bert_loss))
    assert guide.plan.boundary > 0


class WithPositions(nn.Module):
    """Hand-written models keep parameters at the root, beside their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs[:, None] + self.positions
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        result: Tensor = self.head(hidden.mean(1))
        return result


def test_quiet_when_a_module_has_a_frozen_parameter_beside_trained_children() -> None:
    torch.manual_seed(0)
    model = WithPositions()
    optimizer, guide = guided(model, policy="suffix", top=0.5)
    batches = [(torch.randn(5, 8), torch.randn(5, 3)) for _ in range(6)]
    list(fit(model, optimizer, batches, squared_error))
    assert not model.positions.requires_grad
    assert guide.plan.boundary > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("policy", ["suffix", "normalized-max", "top"])
def test_quiet_through_a_warm_up_from_zero(dtype: torch.dtype, every: int, policy: str) -> None:
    model = bert(dtype=dtype)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(parameter.sign() + 0.25)  # no values that the smallest step would move
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0)
    Guide(model, optimizer, Config(policy=policy, every=every))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1000)
    for batch in tokens(11):
        list(fit(model, optimizer, [batch], bert_loss))
        scheduler.step()


def test_quiet_under_accumulation_and_evaluation_in_between() -> None:
    model = bert()
    optimizer, guide = guided(model)
    for _ in range(5):
        optimizer.zero_grad()
        for batch in tokens(3):
            (bert_loss(model, batch) / 3).backward()
        with torch.no_grad():
            bert_loss(model, tokens()[0])
        optimizer.step()
    assert guide.step == 5


def test_quiet_when_a_component_is_not_used_by_the_loss() -> None:
    model = bert()
    optimizer, guide = guided(model, policy="normalized-max", every=2)
    for batch in tokens(6):
        optimizer.zero_grad()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        hidden = model.bert(**inputs).last_hidden_state  # neither the pooler nor the classifier
        hidden.square().mean().backward()
        optimizer.step()
    assert guide.step == 6
    assert float(guide.plan["pooler"]) == 1.0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_quiet_while_frozen_components_are_probed(every: int) -> None:
    model = bert()
    optimizer, guide = guided(model, policy="top", every=every, top=0.4)
    probed = 0
    for batch in tokens(12):
        probed += guide.probing
        list(fit(model, optimizer, [batch], bert_loss))
    assert probed


def test_quiet_with_checkpointing_that_is_not_reentrant() -> None:
    model: Any = bert()
    checkpoint_activations(model)
    model.disable_input_require_grads()
    optimizer, guide = guided(model)
    list(fit(model, optimizer, tokens(6), bert_loss))
    assert guide.step == 6


def test_stops_watching_once_a_plan_is_known_to_hold() -> None:
    model = mlp()
    optimizer, guide = guided(model, policy="head-only", every=2)
    batches = mlp_batches(6)
    assert model[0]._forward_hooks
    list(fit(model, optimizer, batches[:2], squared_error))
    assert not model[0]._forward_hooks
    assert guide.plan.lr_scale == (0.0, 0.0, 1.0)


# -- what it looks at -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_shows_the_least_change_and_a_sign_of_any_element(dtype: torch.dtype) -> None:
    binding, _ = random_binding(0, dtype)
    before = engagement.fingerprints(binding)
    assert before.dtype == torch.int64
    assert torch.equal(before, engagement.fingerprints(binding))
    for index, piece in enumerate(binding.pieces):
        weight = piece.weight
        for position in torch.cartesian_prod(*[torch.arange(n) for n in weight.shape]).tolist():
            at = tuple(position) if isinstance(position, list) else (position,)
            kept = weight[at].clone()
            for other in (torch.nextafter(kept, torch.full_like(kept, 9.0)), -kept):
                weight[at] = other
                changed = engagement.fingerprints(binding) != before
                assert torch.nonzero(changed).flatten().tolist() == [index]
            weight[at] = kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 2**18])
def test_a_step_is_expected_to_show_if_it_would_show_in_any_weight(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engagement, "CHUNK", chunk)
    precision = torch.finfo(dtype).eps
    found = set()
    for seed in range(5):
        binding, _ = random_binding(seed, dtype)
        random_gradients(binding, seed, missing=0.0)
        for rate in (0.1 * precision, precision, 10 * precision):
            for piece in binding.pieces:
                pairs = zip(
                    piece.grad.flatten().tolist(), piece.weight.flatten().tolist(), strict=True
                )
                shows = any(min(abs(g), 1) * rate > precision * abs(w) for g, w in pairs)
                assert bool(engagement._moves(piece.weight, piece.grad, rate)) == shows
                found.add(shows)
    assert found == {True, False}


def test_a_check_asks_the_plan_no_oftener_for_more_components(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each answer goes through all components: asking once for each would be quadratic."""
    trained = Plan.trained.fget
    asked: list[Plan] = []
    monkeypatch.setattr(
        Plan, "trained", property(lambda plan: (asked.append(plan), trained(plan))[1])
    )
    counts = []
    for count in (3, 30):
        asked.clear()
        model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(count)])
        optimizer, guide = guided(model, policy="suffix", top=0.4, every=2)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 5)).square().mean().backward()
            optimizer.step()
        assert len(guide.components) == count
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0
