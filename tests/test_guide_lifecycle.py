"""A guide from its first step to its last: what it checks, gives back and refuses."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import pytest
import torch

from rgft import Config, EngagementError, Guide, InputError, Policy
from tiny import fit, mlp, mlp_batches, squared_error


def test_the_last_plan_is_judged_when_the_guide_closes() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(policy="suffix", top=0.5, every=50))
    list(fit(model, optimizer, mlp_batches(3), squared_error))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(EngagementError, match=r"frozen parameter '0.weight' changed"):
        guide.close()
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_takes_one_guide_at_a_time() -> None:
    model = mlp()
    guide = Guide(model, torch.optim.SGD(model.parameters(), 0.1), Config(policy="suffix"))
    with pytest.raises(InputError, match="this model already has a guide"):
        Guide(model, torch.optim.SGD(model.parameters(), 0.1))
    guide.close()
    Guide(model, torch.optim.SGD(model.parameters(), 0.1))


def test_a_guide_that_is_dropped_gives_back_what_it_froze() -> None:
    model = mlp()
    guide = Guide(model, torch.optim.SGD(model.parameters(), 0.1), Config(policy="suffix"))
    assert not model[0].weight.requires_grad
    del guide
    gc.collect()
    again = Guide(model, torch.optim.SGD(model.parameters(), 0.1))
    assert len(again.components) == 3


@pytest.mark.parametrize("changed", [{"beta": 0.5}, {"signal": "rms"}, {"policy": "rank"}])
def test_a_state_is_not_taken_over_by_other_settings(changed: dict[str, object]) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer)
    list(fit(model, optimizer, mlp_batches(3), squared_error))
    state = guide.state_dict()
    with pytest.warns(RuntimeWarning, match="no plan is decided"):
        guide.close()
    other = Guide(model, optimizer, Config(**changed))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="with the settings it was saved with"):
        other.load_state_dict(state)
    assert other.step == 0
    assert float(other.error_map.values.sum()) == 0


def test_settings_that_changed_are_named_and_the_run_goes_on() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(policy="top", top=0.3, total_steps=9, warmup=1))
    list(fit(model, optimizer, mlp_batches(3), squared_error))
    state = guide.state_dict()
    guide.close()
    same = Guide(model, optimizer, Config(policy="top", top=0.3, total_steps=20, warmup=1))
    same.load_state_dict(state)  # more steps are no other settings
    same.close()
    other = Guide(model, optimizer, Config(policy="top", top=0.5, total_steps=9, warmup=1))
    with pytest.warns(RuntimeWarning, match=r"top is 0\.5 and was 0\.3; the run goes on"):
        other.load_state_dict(state)
    assert other.step == 3


@pytest.mark.parametrize("part", ["lr_scale", "raw", "switched"])
def test_a_damaged_state_is_refused_before_anything_is_taken_over(part: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(every=1))
    list(fit(model, optimizer, mlp_batches(3), squared_error))
    state = guide.state_dict()
    guide.close()
    other = Guide(model, optimizer, Config(every=1))
    with pytest.raises(InputError, match=rf"{part} of this state has 2 values for 3 components"):
        other.load_state_dict({**state, part: state[part][:2]})
    assert other.step == 0
    assert float(other.error_map.values.sum()) == 0
    other.load_state_dict(state)
    assert other.plan.lr_scale == tuple(state["lr_scale"])


IDLE: dict[str, tuple[Config, int]] = {  # settings, and the steps in which they do nothing
    "first decision": (Config(every=4), 4),
    "first decision, used at once": (Config(every=4, lag=False), 3),
    "warm-up": (Config(policy="random", warmup=3, every=1), 3),
    "warm-up before a map": (Config(policy="top", warmup=3, every=5), 3),
}


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", IDLE)
def test_a_run_in_which_the_method_does_nothing_says_so(name: str, planned: bool) -> None:
    config, idle = IDLE[name]
    for steps in (idle, idle + 1):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        given = replace(config, total_steps=steps) if planned else config
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            guide = Guide(model, optimizer, given)
            early = len(notes)
            list(fit(model, optimizer, mlp_batches(steps), squared_error))
            guide.close()
            guide.close()
        scales = guide.error_map.history.column("lr_scale")
        expected = int(steps == idle)
        assert scales.shape == (steps, 3)
        assert bool((scales == 1).all()) == (steps == idle)
        assert [early, len(notes)] == [expected * planned, expected]
        assert all(f"and the run has {steps};" in str(note.message) for note in notes)


def test_a_policy_that_needs_no_map_is_never_idle() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(policy="suffix", every=50))
    list(fit(model, optimizer, mlp_batches(1), squared_error))
    guide.close()


def test_the_policy_keeps_its_own_tensor() -> None:
    mine = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    model = mlp()
    policy = Policy(lambda situation: mine, uses_error=False)
    guide = Guide(model, torch.optim.SGD(model.parameters(), 0.1), Config(policy=policy))
    assert guide.plan.lr_scale == (0.0, 1.0, 1.0)  # the last component is a new head
    assert mine.tolist() == [0.0, 1.0, 0.0]


def test_freezing_without_lag_is_refused_at_once() -> None:
    model = mlp()
    with pytest.raises(InputError, match="lag=False cannot freeze"):
        Guide(model, torch.optim.SGD(model.parameters()), Config(policy="top", lag=False))


def test_what_is_frozen_from_the_start_goes_without_lag() -> None:
    """Backward never reaches it, so that no plan comes too late; against the formula by hand."""
    model, plain = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guide = Guide(model, optimizer, Config(lag=False, every=1, beta=0.5, frozen_below=2))
    error = {2: 0.0, 4: 0.0}
    for batch in mlp_batches(4):
        list(fit(model, optimizer, [batch], squared_error))
        plain.zero_grad()
        squared_error(plain, batch).backward()
        for part, smoothed in error.items():
            squares = [p.grad.square().sum() for p in plain[part].parameters()]
            error[part] = 0.5 * smoothed + 0.5 * float(sum(squares)) ** 0.5
        with torch.no_grad():
            for part, smoothed in error.items():
                rate = 0.1 * (1 + smoothed / max(error.values()))
                for parameter in plain[part].parameters():
                    parameter.sub_(rate * parameter.grad)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    guide.close()


@pytest.mark.parametrize(
    "idle",
    [
        {"signal": "rms", "p": 1.0},
        {"probe_samples": 3},
        {"min_stay": 50},
        {"probe_every": 2},
        {"policy": "random", "probe_every": 2},
        {"policy": "uniform", "alpha": 2.0},
    ],
)
def test_a_setting_that_has_no_effect_is_refused(idle: dict[str, object]) -> None:
    model = mlp()
    with pytest.raises(InputError, match="has no effect"):
        Guide(model, torch.optim.SGD(model.parameters()), Config(**idle))  # type: ignore[arg-type]


def test_multipliers_that_are_held_still_have_mean_one() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    config = Config(policy="top", top=0.5, every=2, min_stay=3, mean_one=True)
    guide = Guide(model, optimizer, config)
    for _ in fit(model, optimizer, mlp_batches(20), squared_error):
        trained = [scale for scale in guide.plan.lr_scale if scale]
        assert sum(trained) == pytest.approx(len(trained))


def test_an_overflow_under_gradient_scaling_is_no_alarm() -> None:
    model = mlp(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    Guide(model, optimizer, Config(every=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    for batch in mlp_batches(4, torch.float32):
        optimizer.zero_grad()
        scaler.scale(squared_error(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update(1.0)
