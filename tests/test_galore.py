"""GaLore against its definition in a plain loop, and against its authors' package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rgft import InputError
from rgft.execution.galore import GaLoreAdamW, Projection, projected_weights
from rgft.spec import RunSpec
from rgft.train import run
from runs import CutError, assert_same, cut_at_save
from tiny import bert, fit, mlp, mlp_batches, squared_error, values

SMALL = Projection(rank=2, every=3, scale=0.5)
LR, DECAY, STEPS = 0.01, 0.1, 10  # four subspaces


def basis_of(gradient: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return left[:, :2] if gradient.shape[0] < gradient.shape[1] else right.T[:, :2]


def test_weights_are_those_of_the_definition() -> None:
    """A tall matrix and a wide one; biases and the head are left to AdamW."""
    batches = mlp_batches(STEPS)
    model, other = mlp(), mlp()
    weights = projected_weights(model)
    assert [tuple(w.shape) for w in weights] == [(7, 5), (6, 7)]
    optimizer = GaLoreAdamW(model.parameters(), weights, SMALL, lr=LR, weight_decay=DECAY)
    list(fit(model, optimizer, batches, squared_error))
    projected = [other[0].weight, other[2].weight]
    rest = [p for p in other.parameters() if all(p is not w for w in projected)]
    plain = torch.optim.AdamW(rest, LR, weight_decay=DECAY)
    basis, m, v = {}, {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}
    for step, batch in enumerate(batches):
        other.zero_grad()
        squared_error(other, batch).backward()
        plain.step()
        for i, weight in enumerate(projected):
            assert weight.grad is not None
            if step % 3 == 0:
                basis[i] = basis_of(weight.grad)
            tall = i == 0
            inside = weight.grad @ basis[i] if tall else basis[i].T @ weight.grad
            m[i] = 0.9 * m[i] + 0.1 * inside
            v[i] = 0.999 * v[i] + 0.001 * inside**2
            root = (v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            adam = m[i] / (1 - 0.9 ** (step + 1)) / root
            lifted = adam @ basis[i].T if tall else basis[i] @ adam
            with torch.no_grad():
                weight.copy_((1 - LR * DECAY) * weight - LR * 0.5 * lifted)
    for name, found in values(model).items():
        torch.testing.assert_close(found, values(other)[name], rtol=1e-9, atol=1e-10)


def test_weights_are_those_of_the_package() -> None:
    package = pytest.importorskip("galore_torch", exc_type=ImportError)
    batches, eps = mlp_batches(STEPS, torch.float32), 1e-12  # which the package adds elsewhere
    model, other = mlp(torch.float32), mlp(torch.float32)
    weights = projected_weights(model)
    ours = GaLoreAdamW(model.parameters(), weights, SMALL, lr=LR, eps=eps, weight_decay=0.0)
    named = dict(other.named_parameters())
    names = [n for n, p in model.named_parameters() if any(p is w for w in weights)]
    settings = {"rank": 2, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
    groups = [
        {"params": [p for n, p in named.items() if n not in names]},
        {"params": [named[n] for n in names], **settings},
    ]
    theirs = package.GaLoreAdamW(groups, LR, eps=eps, no_deprecation_warning=True)
    list(fit(model, ours, batches, squared_error))
    list(fit(other, theirs, batches, squared_error))
    for name, found in values(model).items():
        torch.testing.assert_close(found, values(other)[name], rtol=1e-4, atol=1e-5)


def test_all_linear_layers_but_the_head_are_projected() -> None:
    model = bert(layers=2)
    of = {id(p): name for name, p in model.named_parameters()}
    names = {of[id(weight)] for weight in projected_weights(model)}
    inner = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"classifier"}
    assert names == {f"{name}.weight" for name in inner}
    with pytest.raises(InputError, match="no linear layers but its head"):
        projected_weights(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)))


def test_groups_are_split_and_keep_their_settings() -> None:
    model = mlp()
    weights, biases = (
        [p for n, p in model.named_parameters() if n.endswith(e)] for e in ("weight", "bias")
    )
    groups = [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]
    optimizer = GaLoreAdamW(groups, projected_weights(model), SMALL, lr=LR)
    found = [(len(g["params"]), g["weight_decay"], g["rank"]) for g in optimizer.param_groups]
    assert found == [(1, 0.3, None), (2, 0.3, 2), (3, 0.0, None)]


def test_state_is_that_of_the_subspace() -> None:
    model = mlp()
    optimizer = GaLoreAdamW(model.parameters(), projected_weights(model), SMALL, lr=LR)
    list(fit(model, optimizer, mlp_batches(1), squared_error))
    shapes = {key: tuple(v.shape) for key, v in optimizer.state[model[0].weight].items()}
    assert shapes == {"step": (), "exp_avg": (7, 2), "exp_avg_sq": (7, 2), "basis": (5, 2)}


def test_a_gradient_that_is_not_finite_is_no_error_of_its_own() -> None:
    model = mlp()
    optimizer = GaLoreAdamW(model.parameters(), projected_weights(model), SMALL, lr=LR)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    assert all(p.isnan().all() for p in model.parameters())


def test_rgft_train_projects_and_resumes_to_the_same_bits(
    tiny_model: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model": str(tiny_model), "data": str(small_data), "batch_size": 8, "evaluations": 1}
    settings = {"galore_every": 3}
    spec = RunSpec(**given, method="galore", epochs=2, lr=1e-3, settings=settings)  # type: ignore[arg-type]
    record = run(spec, tmp_path / "whole")
    other = run(replace(spec, settings={**settings, "galore_scale": 0.5}), tmp_path / "other")
    losses = [r["metrics"]["validation"]["loss"] for r in (record, other)]
    assert losses[0] != losses[1]
    assert record["flops"]["share"] == 1.0
    with monkeypatch.context() as patched, pytest.raises(CutError):
        cut_at_save(patched, 1)
        run(spec, tmp_path / "cut")
    run(spec, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
