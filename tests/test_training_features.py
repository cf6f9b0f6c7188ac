"""What training loops do besides stepping: schedules, accumulation, scaling, adapters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from rgft import Config, FlopMeter, Guide, Policy, Situation
from tiny import (
    bert,
    bert_loss,
    checkpoint_activations,
    fit,
    mlp,
    mlp_batches,
    same_state,
    squared_error,
    tokens,
    values,
)

SCALES = (0.5, 0.0, 2.0)
STEPS = 8
Schedule = Callable[[torch.optim.Optimizer], Any]

TORCH: dict[str, Schedule] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS + 1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}
OF_TRANSFORMERS: dict[str, Schedule] = {
    f"transformers-{kind.value}": lambda o, kind=kind: get_scheduler(
        kind,
        o,
        num_warmup_steps=2,
        num_training_steps=STEPS + 1,
        scheduler_specific_kwargs={
            "cosine_with_min_lr": {"min_lr": 1e-4},
            "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
            "warmup_stable_decay": {"num_decay_steps": 3},
            "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
            "greedy": {"patience": 0, "factor": 0.5},
        }.get(kind.value),
    )
    for kind in TYPE_TO_SCHEDULER_FUNCTION
}
SCHEDULES = TORCH | OF_TRANSFORMERS
READ_LOSS = ("ReduceLROnPlateau", "transformers-reduce_lr_on_plateau", "transformers-greedy")


def fixed(scale: tuple[float, ...]) -> Policy:
    return Policy(
        lambda _: torch.tensor(scale, dtype=torch.float64), uses_error=False, changes=False
    )


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.01, momentum=0.9, weight_decay=0.1)


def settings_over_time(make: Schedule, name: str, losses: list[float]) -> list[tuple[Any, Any]]:
    """Rate and momentum at each step, without a guide."""
    optimizer = sgd([nn.Parameter(torch.ones(2))])
    scheduler = make(optimizer)
    found = []
    for loss in losses:
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step(*([loss] if name in READ_LOSS else []))
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_unscaled_and_its_rates_are_multiplied(name: str) -> None:
    model, by_hand = mlp(), mlp()
    losses = [1.0, 1.0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4]
    optimizer = sgd(model.parameters())
    Guide(model, optimizer, Config(policy=fixed(SCALES), every=2))
    scheduler = SCHEDULES[name](optimizer)
    wanted = settings_over_time(SCHEDULES[name], name, losses)
    assert len(set(wanted)) > 1 or name == "transformers-constant"
    kept = [(2 * i, m) for i, m in enumerate(SCALES) if m]
    real = sgd([{"params": list(by_hand[i].parameters())} for i, _ in kept])
    for batch, loss, (rate, momentum) in zip(mlp_batches(STEPS), losses, wanted, strict=True):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["momentum"]) == (rate, momentum)
        list(fit(model, optimizer, [batch], squared_error))
        scheduler.step(*([loss] if name in READ_LOSS else []))
        for real_group, (_, multiplier) in zip(real.param_groups, kept, strict=True):
            real_group.update(lr=rate * multiplier, momentum=momentum)
        list(fit(by_hand, real, [batch], squared_error))
    assert same_state(values(model), values(by_hand))


def test_no_schedule_is_missing() -> None:
    there = {
        name
        for name in lr_scheduler.__all__
        if inspect.isclass(getattr(lr_scheduler, name)) and name != "LRScheduler"
    }
    assert there | {"SWALR"} == set(TORCH)


# -- accumulation and gradient scaling --------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = mlp(), mlp()
    guides = []
    for model, pieces in ((whole, 1), (parts, 4)):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        guides.append(Guide(model, optimizer, Config(policy="top", top=0.5, every=2)))
        for inputs, targets in mlp_batches(9):
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
                (squared_error(model, (x, y)) / pieces).backward()
            optimizer.step()
    assert guides[0].plan == guides[1].plan
    assert not all(guides[0].plan.trained)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=1e-12, atol=1e-13)


def test_clipping_leaves_the_shares_of_a_step_as_they_are() -> None:
    shares = []
    for limit in (1e9, 1e-3):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        guide = Guide(model, optimizer, Config(every=1, beta=0.0, engagement="off"))
        squared_error(model, mlp_batches(1)[0]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        shares.append(guide.error_map.values / guide.error_map.values.sum())
    torch.testing.assert_close(shares[0], shares[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_scores_are_of_unscaled_gradients_and_overflows_change_nothing(fused: bool) -> None:
    """A fused optimizer is given scaled gradients, and is called even if they overflowed."""
    models = [mlp(torch.float32), mlp(torch.float32)]
    guides = []
    for model, scale in zip(models, (1.0, 2.0**10), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
        guides.append(Guide(model, optimizer, Config(policy="normalized-max", every=2)))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for t, batch in enumerate(mlp_batches(6, torch.float32)):
            optimizer.zero_grad()
            scaler.scale(squared_error(model, batch)).backward()
            if t == 3:
                model[0].weight.grad[0, 0] = torch.inf
                before = values(model)
            scaler.step(optimizer)
            scaler.update()
            if t == 3:
                assert same_state(before, values(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.testing.assert_close(guides[0].error_map.values, guides[1].error_map.values)


# -- checkpointing ----------------------------------------------------------------------------


def trained_suffix(model: nn.Module) -> tuple[torch.optim.Optimizer, Guide]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    return optimizer, Guide(model, optimizer, Config(policy="suffix", top=0.4, every=2))


@pytest.mark.parametrize("again", [False, True])
def test_truncation_is_restored_under_checkpointing(again: bool) -> None:
    """transformers makes the embeddings' output require a gradient when it checkpoints."""
    model: Any = bert()
    checkpoint_activations(model)
    seen: list[bool] = []
    model.bert.encoder.layer[0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.requires_grad)
    )
    bert_loss(model, tokens()[0])
    assert seen.pop()
    optimizer, _ = trained_suffix(model)
    plain: Any = bert()
    other, _ = trained_suffix(plain)
    for batch in tokens(5):
        if again:  # as DPO does, after its reference
            checkpoint_activations(model)
        list(fit(model, optimizer, [batch], bert_loss))
    list(fit(plain, other, tokens(5), bert_loss))
    assert not any(seen)
    assert same_state(values(model), values(plain))


# -- adapters ---------------------------------------------------------------------------------

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def adapted(kind: str = "lora") -> Any:
    config = LoraConfig(
        r=4, target_modules=["query", "value"], modules_to_save=["classifier"], **KINDS[kind]
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # peft asks transformers by a name that goes out of use
        torch.manual_seed(0)
        return get_peft_model(bert(), config).train()


def switch_off_and_on(model: Any) -> None:
    with model.disable_adapter(), torch.no_grad():
        bert_loss(model, tokens()[0])


def set_again(model: Any) -> None:
    model.set_adapter("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switch", [switch_off_and_on, set_again], ids=lambda s: s.__name__)
def test_adapters_that_are_switched_stay_frozen(kind: str, switch: Callable[[Any], None]) -> None:
    """peft makes every pair require a gradient again; DPO switches adapters at each step."""
    models = [adapted(kind), adapted(kind)]
    for model, switches in zip(models, (True, False), strict=True):
        optimizer, guide = trained_suffix(model)
        frozen = {n for n, p in guide.binding.parameters.items() if n not in guide.active}
        assert frozen
        for batch in tokens(5):
            if switches:
                switch(model)
                named = dict(model.named_parameters())
                assert any(named[n].requires_grad for n in frozen)
            list(fit(model, optimizer, [batch], bert_loss))
        guide.close()
    assert same_state(values(models[0]), values(models[1]))


def with_a_second() -> Any:
    """An adapter that is there, and does not train."""
    model = adapted()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=4, target_modules=["query", "value"]))
    return model


def test_a_second_adapter_is_left_alone() -> None:
    model = with_a_second()
    optimizer, _ = trained_suffix(model)
    before: dict[str, Tensor] = {n: v for n, v in values(model).items() if ".other." in n}
    list(fit(model, optimizer, tokens(4), bert_loss))
    assert before
    assert all(torch.equal(values(model)[n], value) for n, value in before.items())


def test_a_pair_has_a_score_before_its_first_factor_has_a_gradient() -> None:
    """B begins at 0, so that the gradient of A is exactly 0 in the first step."""
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    guide = Guide(model, optimizer, Config(granularity="lora", every=1))
    bert_loss(model, tokens()[0]).backward()
    first = [p.grad for n, p in model.named_parameters() if "lora_A" in n]
    assert first and not any(grad.any() for grad in first)
    optimizer.step()
    parts = zip(guide.components, guide.error_map.values, strict=True)
    scores = [score for component, score in parts if component.kind == "lora"]
    assert len(scores) == len(first)
    assert all(score > 0 for score in scores)


# -- compiled blocks --------------------------------------------------------------------------


def moving_boundary(situation: Situation) -> Tensor:
    scale = torch.ones_like(situation.error)
    scale[: situation.step // 2 % 4] = 0.0
    return scale


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_compiled_blocks_follow_every_change_of_plan() -> None:
    """Masks come back and go; gradients are those of a model that is not compiled."""
    torch._dynamo.reset()
    seen: list[list[set[str]]] = []
    models = [bert(2), bert(2)]
    for model, compiled in zip(models, (False, True), strict=True):
        if compiled:
            for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
                layer.compile(backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        Guide(model, optimizer, Config(policy=Policy(moving_boundary, False), every=2))
        seen.append([])
        for batch in tokens(10):
            optimizer.zero_grad()
            bert_loss(model, batch).backward()
            seen[-1].append({n for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
    assert seen[0] == seen[1]
    assert len({frozenset(names) for names in seen[0]}) == 4
    for name, value in values(models[0]).items():
        torch.testing.assert_close(values(models[1])[name], value, rtol=1e-5, atol=1e-6)


def one_of_each(situation: Situation) -> Tensor:
    """Another mask at each step: its number in binary."""
    bits = [float(situation.step >> k & 1) for k in range(len(situation.error) - 1)]
    return torch.tensor([*bits, 1.0], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")  # dynamo's own, and ours
@torch._dynamo.config.patch(recompile_limit=2)
def test_a_model_compiled_as_a_whole_follows_more_plans_than_pytorch_compiles() -> None:
    """Past its limit of recompilations it runs uncompiled; a meter is not compiled with it."""
    torch._dynamo.reset()
    config = Config(
        policy=Policy(one_of_each, False, freezes=True),
        granularity="parameter",
        every=1,
        always_train=(),
    )
    seen: list[list[set[str]]] = []
    models, meters = [mlp(), mlp()], []
    for model, compiled in zip(models, (False, True), strict=True):
        run: Any = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        Guide(model, optimizer, config)
        meters.append(FlopMeter(model))
        seen.append([])
        for batch in mlp_batches(5):
            optimizer.zero_grad()
            squared_error(run, batch).backward()
            seen[-1].append({n for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
    assert seen[0] == seen[1]
    assert len({frozenset(names) for names in seen[0]}) == 5
    assert meters[0].totals == meters[1].totals
    for name, value in values(models[0]).items():
        torch.testing.assert_close(values(models[1])[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["wrapper", "in place"])
def test_freezing_in_a_model_compiled_as_a_whole_is_warned_of(way: str) -> None:
    model: Any = mlp()
    if way == "wrapper":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    Guide(model, optimizer, Config(policy="normalized-max")).close()
    with pytest.warns(RuntimeWarning, match="compile its layers instead"):
        Guide(model, optimizer, Config(policy="top", top=0.5, total_steps=99))


@pytest.mark.parametrize("way", ["wrapper", "in place", "around more", "a layer"])
def test_compiling_that_the_guide_was_not_told_of_is_warned_of_at_the_first_step(way: str) -> None:
    """A loop that calls a compiled wrapper around the model that was given."""
    torch._dynamo.reset()
    model: Any = mlp(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    guide = Guide(model, optimizer, Config(policy="top", top=0.5, every=9, total_steps=99))
    if way == "in place":
        model.compile(backend="eager")
    around = nn.Sequential(model) if way == "around more" else model
    wrapper: Any = torch.compile(model[0] if way == "a layer" else around, backend="eager")
    run: Any = model if way in ("in place", "a layer") else wrapper
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", RuntimeWarning)
        list(fit(run, optimizer, mlp_batches(2, torch.float32), squared_error))
    said = [note for note in notes if "compile its layers instead" in str(note.message)]
    assert len(said) == (way != "a layer")
    assert all(Path(note.filename).name == "tiny.py" for note in said)
    guide.close()
