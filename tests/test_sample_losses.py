"""Losses of single samples: against a loop, and against what the models themselves return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rgft.errors import InputError
from rgft.sample_losses import LOSSES, sample_correct, sample_losses


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def test_classification() -> None:
    logits, labels = drawn(5, 3), torch.tensor([0, 2, 1, -100, 2])
    losses = sample_losses(logits, labels)
    for row in (0, 1, 2, 4):
        assert torch.allclose(losses[row], F.cross_entropy(logits[row], labels[row]))
    assert losses[3] == 0
    assert torch.allclose(losses.sum() / 4, F.cross_entropy(logits, labels))
    right = sample_correct(logits, labels)
    assert right is not None
    assert right.tolist() == [
        label in (-100, int(row.argmax())) for row, label in zip(logits, labels, strict=True)
    ]


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_tokens(kind: str) -> None:
    logits = drawn(4, 6, 9)
    labels = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 3:] = labels[1, :2] = labels[2] = -100
    labels[3, 1:] = logits[3, :-1].argmax(-1) if kind == "causal-lm" else logits[3, 1:].argmax(-1)
    labels[3, 0] = logits[3, 0].argmax()
    shift = kind == "causal-lm"
    sums, means = (sample_losses(logits, labels, kind, reduction=r) for r in ("sum", "mean"))
    for row in range(4):
        steps = range(1, 6) if shift else range(6)
        known = [t for t in steps if labels[row, t] != -100]
        terms = [F.cross_entropy(logits[row, t - shift], labels[row, t]) for t in known]
        total = sum(terms, torch.zeros((), dtype=torch.float64))
        assert torch.allclose(sums[row], total)
        assert torch.allclose(means[row], total / max(1, len(known)))
    right = sample_correct(logits, labels, kind)
    assert right is not None
    assert right.tolist() == [False, False, True, True]
    (gradient,) = torch.autograd.grad(means.sum(), logits)
    assert torch.isfinite(gradient).all() and (gradient[2] == 0).all()


def test_sums_over_tokens_make_the_loss_of_a_language_model() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1)).eval()
    ids = torch.randint(30, (3, 7))
    labels = ids.clone()
    labels[0, 4:] = -100
    out = model(input_ids=ids, labels=labels)
    tokens = (labels[:, 1:] != -100).sum()
    found = sample_losses(out.logits, labels, "causal-lm", reduction="sum").sum() / tokens
    assert torch.allclose(found, out.loss)


@pytest.mark.parametrize(
    "shapes", [((4,), (4,)), ((4, 1), (4,)), ((4, 1), (4, 1)), ((4, 3), (4, 3))]
)
def test_regression(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    logits, labels = drawn(*shapes[0]), drawn(*shapes[1]).detach() * 2
    losses = sample_losses(logits, labels, "regression")
    wanted = [
        F.mse_loss(row.reshape(-1), label.reshape(-1))
        for row, label in zip(logits, labels, strict=True)
    ]
    assert torch.allclose(losses, torch.stack(wanted))
    assert sample_correct(logits, labels, "regression") is None


def test_multi_label() -> None:
    logits, labels = drawn(4, 3), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    losses = sample_losses(logits, labels, "multi-label")
    for row in range(4):
        wanted = F.binary_cross_entropy_with_logits(logits[row], labels[row].double())
        assert torch.allclose(losses[row], wanted)
    right = sample_correct(logits, (logits > 0).long(), "multi-label")
    wrong = sample_correct(logits, (logits < 0).long(), "multi-label")
    assert right is not None and right.all()
    assert wrong is not None and not wrong.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    logits, labels = drawn(2, 4, dtype=dtype), torch.tensor([1, 3])
    losses = sample_losses(logits, labels)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, sample_losses(logits.float(), labels))


@pytest.mark.parametrize("kind", list(LOSSES))
def test_refuses_shapes_that_do_not_fit(kind: str) -> None:
    with pytest.raises(InputError, match=r"logits are \(4, 2, 3\) and labels \(4, 5\)"):
        sample_losses(torch.zeros(4, 2, 3), torch.zeros(4, 5, dtype=torch.int64), kind)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sample_losses(torch.zeros(2, 3), torch.zeros(2)), "labels are torch.float32"),
        (lambda: sample_losses(torch.zeros(2, 3), torch.zeros(2), "mlm"), "unknown kind 'mlm'"),
        (lambda: sample_correct(torch.zeros(2, 3), torch.zeros(2), "mlm"), "unknown kind 'mlm'"),
        (
            lambda: sample_losses(torch.zeros(2, 1), torch.zeros(2), "regression", reduction="max"),
            "unknown reduction 'max'",
        ),
        (lambda: sample_losses(torch.zeros(2, 2), torch.zeros(2), "regression"), "allowed"),
    ],
)
def test_refuses_what_it_does_not_know(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
