"""Losses of single samples, and whether each was predicted right, from a model's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rgft.errors import InputError, unknown

IGNORED = -100  # label of a position that has none, as in PyTorch and transformers
Reduction = Literal["mean", "sum"]


def sample_losses(
    logits: Tensor, labels: Tensor, kind: str = "classification", *, reduction: Reduction = "mean"
) -> Tensor:
    r"""The loss of each sample of a batch, with its gradient.

    - "classification": cross-entropy. Labels `[B, ...]` are whole numbers, logits `[B, ..., C]`.
      Further dimensions are positions (a label for each token).
    - "causal-lm": the same, where the logits of position t predict the label of t + 1.
    - "multi-label": binary cross-entropy, labels 0 or 1 `[B, C]`, logits `[B, C]`.
    - "regression": squared error; labels `[B]` or `[B, D]`, logits `[B]`, `[B, 1]` or `[B, D]`.

    Positions with label -100 are left out. A sample of which nothing is left has the loss 0.

    With "mean" a long sample counts as much as a short one. A Hugging Face model's own loss of
    texts is instead the mean over all tokens of the batch: that is the *sum* of "sum" losses,
    divided by the number of tokens.

    Args:
        logits: What the model returned.
        labels: On the same device.
        kind: One of the above.
        reduction: Over the positions of a sample: "mean" or "sum".

    Returns:
        `[B]`, in single precision or that of the logits if that is higher.

    Raises:
        InputError: Kind, reduction or shapes do not fit.

    >>> sample_losses(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1])).tolist()
    [0.693..., 0.0001...]
    >>> sample_losses(torch.tensor([[2.0], [1.0]]), torch.tensor([0.0, 1.0]), "regression").tolist()
    [4.0, 0.0]
    """
    if kind not in LOSSES:
        raise unknown("kind", kind, LOSSES)
    if reduction not in ("mean", "sum"):
        raise unknown("reduction", str(reduction), ["mean", "sum"])
    logits = logits.float() if logits.itemsize < 4 else logits
    losses, counted = LOSSES[kind](logits, labels)
    sums = torch.where(counted, losses, 0).flatten(1).sum(1)
    if reduction == "sum":
        return sums
    return sums / counted.flatten(1).sum(1).clamp_min(1)


def sample_tokens(labels: Tensor, kind: str = "classification") -> Tensor:
    """How many positions of each sample count: what its mean loss is a mean over, `[B]`.

    >>> sample_tokens(torch.tensor([[-100, 5, 6], [7, 8, -100]]), "causal-lm").tolist()
    [2, 1]
    """
    counted = (labels[:, 1:] if kind == "causal-lm" else labels) != IGNORED
    return counted.flatten(1).sum(1)


def sample_correct(logits: Tensor, labels: Tensor, kind: str = "classification") -> Tensor | None:
    """Whether each sample of a batch was predicted right in all its positions; for the ledger.

    Args:
        logits: As for `sample_losses`.
        labels: As for `sample_losses`.
        kind: As for `sample_losses`.

    Returns:
        bool `[B]`; None for "regression", where right and wrong have no meaning.

    Raises:
        InputError: Kind or shapes do not fit.

    >>> sample_correct(torch.tensor([[0.0, 1.0], [0.0, 9.0]]), torch.tensor([0, 1])).tolist()
    [False, True]
    """
    if kind not in LOSSES:
        raise unknown("kind", kind, LOSSES)
    if kind == "regression":
        return None
    if kind == "multi-label":
        _fit(logits.shape == labels.shape and labels.ndim > 1, logits, labels, "[B, C] for both")
        return ((logits > 0) == (labels > 0.5)).flatten(1).all(1)
    if kind == "causal-lm":
        logits, labels = _shifted(logits, labels)
    _fit_classes(logits, labels)
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return right.reshape(len(right), -1).all(1)


def _classification(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _fit_classes(logits, labels)
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    shape = (len(labels), -1) if labels.numel() else (len(labels), 0)
    return losses.view(shape), (labels != IGNORED).view(shape)


def _causal_lm(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _classification(*_shifted(logits, labels))


def _shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    fits = logits.ndim == 3 and logits.shape[:2] == labels.shape
    _fit(fits, logits, labels, "[B, T, V] and [B, T]")
    return logits[:, :-1], labels[:, 1:].contiguous()


def _multi_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _fit(logits.shape == labels.shape and labels.ndim > 1, logits, labels, "[B, C] for both")
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
    return losses, torch.ones_like(losses, dtype=torch.bool)


def _regression(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = (t[:, None] if t.ndim == 1 else t for t in (logits, labels))
    # without this check [B, 1] and [B] would broadcast to [B, B]
    _fit(logits.shape == labels.shape, logits, labels, "[B] or [B, 1], or [B, D] for both")
    losses = (logits - labels.to(logits)).square()
    return losses, torch.ones_like(losses, dtype=torch.bool)


def _fit_classes(logits: Tensor, labels: Tensor) -> None:
    fits = labels.ndim > 0 and logits.shape[:-1] == labels.shape
    _fit(fits, logits, labels, "[B, ..., C] and [B, ...]")
    if labels.is_floating_point():
        raise InputError(
            f"labels are {labels.dtype}; allowed: numbers of classes, such as torch.int64 (other "
            "kinds are 'regression' and 'multi-label')"
        )


def _fit(fits: bool, logits: Tensor, labels: Tensor, allowed: str) -> None:
    if not fits:
        raise InputError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; allowed: {allowed}"
        )


LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "classification": _classification,
    "causal-lm": _causal_lm,
    "multi-label": _multi_label,
    "regression": _regression,
}
"""Losses `[B, positions]` and which of them count, by kind."""
