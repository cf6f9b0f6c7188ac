"""How well the gradient under a bypass agrees with the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Component, partition
from rgft.errors import InputError
from rgft.execution.bypass import Bypass, is_bypassed
from rgft.granularities import Granularity
from rgft.structure.residual_branches import residual_branches

Gradients = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosines between gradients under a bypass and exact gradients; 1 is full agreement.

    Attributes:
        cosine: Over all parameters that still get a gradient.
        by_component: Of each component that still gets a gradient.
    """

    cosine: float
    by_component: Mapping[str, float]


def gradient_agreement(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    bypassed: Collection[str],
    granularity: Granularity = "layer",
) -> Agreement:
    r"""Compares the gradient under a bypass with the exact one.

    .. math:: \cos_k = \frac{\langle \tilde g_k, g_k \rangle}{\|\tilde g_k\| \|g_k\|}

    where :math:`g_k` is the gradient of the mean loss over `batches` for component k, and
    :math:`\tilde g_k` the same under the bypass. Both see the same dropout. Only what requires a
    gradient and still gets one is compared, so freeze first what a plan would freeze. Weights,
    gradients and buffers of the model are left as they are.

    Args:
        model: In training mode, with nothing bypassed.
        loss: Scalar loss of a batch, `lambda model, batch: model(**batch).loss`.
        batches: At least one.
        bypassed: Components to bypass.
        granularity: Splits the model into components, as in `partition`.

    Returns:
        The cosines; NaN where one of the gradients is 0.

    Raises:
        InputError: A component cannot be bypassed, there is no batch, the model is in evaluation
            mode or bypassed already, or nothing trains under the bypass.
    """
    if not model.training:
        raise InputError("the model is in evaluation mode, where nothing is bypassed: call train()")
    if is_bypassed(model):
        raise InputError("the model is bypassed, so no gradient of it is exact: close() that first")
    if not batches:
        raise InputError("there are no batches to compare gradients on: give at least one")
    components = partition(model, granularity)
    bypass = Bypass(model, residual_branches(model, components, lambda m: loss(m, batches[0])))
    with _kept_buffers(model):
        exact, approximate = _sums(model, loss, batches, bypass, bypassed)
    if not approximate:
        raise InputError(
            "no parameter that requires a gradient gets one under this bypass: bypass fewer "
            "components, or unfreeze one that is not bypassed"
        )
    products = {c.name: _products(c, exact, approximate) for c in components}
    parts = {name: product for name, product in products.items() if product is not None}
    total = torch.stack(list(parts.values())).sum(0)
    return Agreement(_cosine(total), {name: _cosine(part) for name, part in parts.items()})


def _sums(
    model: nn.Module, loss: Loss, batches: Sequence[Any], bypass: Bypass, names: Collection[str]
) -> tuple[Gradients, Gradients]:
    """Gradients summed over batches, without and with the bypass, under the same random numbers."""
    exact: Gradients = {}
    approximate: Gradients = {}
    for batch in batches:
        with torch.random.fork_rng():
            _add(exact, model, loss(model, batch))
        bypass.set(names)
        try:
            _add(approximate, model, loss(model, batch))
        finally:
            bypass.close()
    return exact, approximate


def _add(total: Gradients, model: nn.Module, loss: Tensor) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not loss.requires_grad:
        return
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, grad in zip(trained, grads, strict=True):
        if grad is not None:
            total[name] = total[name] + grad if name in total else grad


def _products(component: Component, exact: Gradients, approximate: Gradients) -> Tensor | None:
    """Inner product and squared norms `[3]` of the gradients of a component; None without one."""
    pairs = [
        (s.of(exact[s.parameter]).double(), s.of(approximate[s.parameter]).double())
        for s in component.slices
        if s.parameter in approximate
    ]
    products = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs]
    return torch.stack(products).sum(0).cpu() if products else None


def _cosine(products: Tensor) -> float:
    inner, *squares = products.tolist()
    norms = math.sqrt(squares[0]) * math.sqrt(squares[1])
    return inner / norms if norms else math.nan


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, such as the running means of batch norms, are put back."""
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)
