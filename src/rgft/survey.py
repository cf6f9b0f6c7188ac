r"""A survey of a pre-trained model before it is fine-tuned: where does it already know the answer?

A few samples are run forward once. For every layer, a ridge regression from the layer's pooled
output to the labels says how much of their variance that output explains, on samples left out:

.. math:: R^2_d = 1 - \frac{\sum_n \|y_n - \hat y_{d,-n}\|^2}{\sum_n \|y_n - \bar y_{-n}\|^2}

What remains is the residual that fine-tuning has to remove. Where an early layer's output explains
(nearly) as much as that of any layer, the layers up to it need no training for this task: the
answer is there, and what is missing is its way to the output. Where no layer explains anything,
the answer has to be made from scratch, by every layer if there is compute enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.errors import InputError
from rgft.structure.architecture import outline

PENALTIES = tuple(10.0**exponent for exponent in range(-3, 5))
ENOUGH = 0.9  # of the best layer's R^2: the layers below add nothing
SOMETHING = 0.15  # least R^2 of the best layer at which the labels count as known
NOISE = 0.03  # R^2 up to which no layer is told from another
LAST = 6  # one layer of so many is of the pre-training's own, where the labels do not tell
TOO_FEW = "a survey needs samples with different labels, it got {} samples; give it more"


@dataclass(frozen=True, slots=True)
class Survey:
    """What the layers know of the labels.

    Attributes:
        depths: Depth of each layer, as in `rgft.Component.depth`.
        explained: Share of the labels' variance that each layer's output explains, left-one-out.
        samples: How many samples were looked at.
    """

    depths: tuple[int, ...]
    explained: tuple[float, ...]
    samples: int

    def known(self, something: float = SOMETHING) -> bool:
        """Whether some layer explains at least `something` of the labels' variance."""
        return max(self.explained) >= something

    def frozen_below(
        self, kept: int | None = None, enough: float = ENOUGH, something: float = SOMETHING
    ) -> int:
        """Depth of the first component that should train.

        The first layer whose output explains `enough` of what the best does ends the part that
        stays frozen, but for the last two layers that the model has by now, `kept` of them (those
        of use by default): one alone has too little to learn with. If even the best explains less
        than `something`, only the embeddings stay frozen.

        >>> Survey((1, 2, 3, 4), (0.2, 0.5, 0.52, 0.53), 1000).frozen_below()
        3
        >>> Survey((1, 2, 3, 4), (0.2, 0.3, 0.4, 0.53), 1000).frozen_below()
        3
        >>> Survey((1, 2, 3), (0.01, 0.03, 0.02), 1000).frozen_below()
        1
        """
        if not self.known(something):
            return min(self.depths)
        best = max(self.explained)
        known = [d for d, r in zip(self.depths, self.explained, strict=True) if r >= enough * best]
        last_but_one = max(0, (kept or self.layers(something)) - 2)
        return min(min(known) + 1, self.depths[last_but_one])

    def told(self) -> str:
        """What was found, in a few words.

        >>> Survey((1, 2, 3), (0.2, 0.5, 0.52), 1000).told()
        "survey of 1,000 samples: layer 3 of 3 explains most of the labels' variance, 52%"
        >>> Survey((1, 2, 3), (0.01, 0.03, 0.02), 1000).told()
        "survey of 1,000 samples: no layer explains 15% of the labels' variance (at most 3%)"
        """
        best = max(self.explained)
        place = self.explained.index(best) + 1
        found = (
            f"layer {place} of {len(self.depths)} explains most of the labels' variance, {best:.0%}"
            if self.known()
            else f"no layer explains {SOMETHING:.0%} of the labels' variance (at most {best:.0%})"
        )
        return f"survey of {self.samples:,} samples: {found}"

    def layers(self, something: float = SOMETHING, noise: float = NOISE) -> int:
        """How many layers are of use: up to the one after that whose output explains most.

        What pre-training has the last layers do is its own task; they can undo what a layer below
        them knows of this one. If even the best explains less than `something`, the answer has to
        be made, and one layer more is kept, but never the last sixth of all; if it explains no more
        than `noise`, only that sixth is not. (That the last layers matter least to a task is no
        matter of one task: Sajjad et al. 2023, "On the effect of dropping layers of pre-trained
        transformer models".)

        >>> Survey((1, 2, 3, 4), (0.2, 0.5, 0.4, 0.3), 1000).layers()
        3
        >>> Survey((1, 2, 3, 4), (0.07, 0.05, 0.04, 0.03), 1000).layers()
        3
        >>> Survey((1, 2, 3, 4, 5, 6), (0.0, 0.01, 0.0, 0.0, 0.0, 0.0), 1000).layers()
        5
        """
        count, best = len(self.explained), max(self.explained)
        first_best = self.explained.index(best) + 1
        if self.known(something):
            return min(first_best + 1, count)
        most = count - count // LAST
        return most if best <= noise else min(first_best + 2, most)


def survey(model: nn.Module, batches: Iterable[dict[str, Any]], label: str = "labels") -> Survey:
    """Run `batches` through `model` without gradients, and see what each layer knows.

    Args:
        model: A model with layers; in evaluation mode while it is surveyed.
        batches: Keyword arguments of `model`, with the labels: classes (int64 `[B]`) or numbers
            (float `[B]` or `[B, n]`). Positions where "attention_mask" is 0 are left out.
        label: The key of the labels; they are not given to the model.

    Raises:
        InputError: The model has no layers, or there are too few samples or labels to compare.
    """
    layers = [(part.depth, part.module) for part in outline(model) if part.module is not None]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layers to survey; choose what trains by frozen_below"
        )
    pooled: list[list[Tensor]] = [[] for _ in layers]
    labels: list[Tensor] = []
    mode = model.training
    model.eval()
    with _captured([m for _, m in layers]) as outputs, torch.no_grad():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != label}
            labels.append(batch[label].detach().cpu())
            model(**inputs)
            mask = inputs.get("attention_mask")
            for kept, output in zip(pooled, outputs, strict=True):
                kept.append(_pooled(output[0], mask))
    model.train(mode)
    if not labels:
        raise InputError(TOO_FEW.format(0))
    targets = _targets(torch.cat(labels))
    explained = [ridge_explained(torch.cat(features), targets) for features in pooled]
    return Survey(tuple(depth for depth, _ in layers), tuple(explained), len(targets))


def ridge_explained(features: Tensor, targets: Tensor) -> float:
    r"""Share of the targets' variance that ridge regression explains, leaving one out.

    With the hat matrix :math:`H = K (K + \lambda I)^{-1}`, :math:`K` the Gram matrix of centred and
    scaled features, the error on a sample left out is :math:`(y - Hy)_n / (1 - H_{nn} - 1/N)`
    (Allen 1974); the best :math:`\lambda` of a grid counts, and nothing explained counts as 0.

    Args:
        features: `[N, p]`.
        targets: `[N, q]`, not all the same.

    Raises:
        InputError: Fewer than 3 samples, or targets that do not vary.
    """
    count = len(features)
    targets = targets.double() - targets.double().mean(0)
    if count < 3 or float(targets.square().sum()) == 0:
        raise InputError(TOO_FEW.format(count))
    scaled = features.double() - features.double().mean(0)
    spread = scaled.square().mean(0).sqrt()
    scaled = scaled / torch.where(spread > 0, spread, 1.0) / features.shape[1] ** 0.5
    eigenvalues, vectors = torch.linalg.eigh(scaled @ scaled.T)
    projected = vectors.T @ targets
    baseline = float((targets * count / (count - 1)).square().sum())
    best = 0.0
    for penalty in PENALTIES:
        shrink = eigenvalues.clamp_min(0) / (eigenvalues.clamp_min(0) + penalty)
        hat = (vectors.square() * shrink).sum(1)
        errors = (targets - vectors @ (shrink[:, None] * projected)) / (
            (1 - hat - 1 / count).clamp_min(1e-9)[:, None]
        )
        best = max(best, 1 - float(errors.square().sum()) / baseline)
    return best


def _targets(labels: Tensor) -> Tensor:
    """Labels as numbers, `[N, q]`: classes become indicators."""
    if labels.is_floating_point():
        return labels.reshape(len(labels), -1)
    if labels.ndim != 1:
        raise InputError(
            f"a survey needs one label a sample, it got labels of shape {tuple(labels.shape)}; "
            "choose what trains by frozen_below"
        )
    return nn.functional.one_hot(labels, int(labels.max()) + 1).float()


def _pooled(output: Tensor, mask: Tensor | None) -> Tensor:
    """A vector a sample: the mean over positions, `[B, C]`, on the host."""
    if output.ndim == 2:
        return output.float().cpu()
    if output.ndim == 4:  # images: channels first
        return output.float().mean((2, 3)).cpu()
    if mask is None or mask.shape != output.shape[:2]:
        return output.float().mean(1).cpu()
    weight = mask[..., None].float()
    mean: Tensor = (output.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
    return mean.cpu()


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """The first output of each module in the last forward pass."""
    outputs: list[list[Tensor]] = [[] for _ in modules]

    def keep(into: list[Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            into[:] = [output[0] if isinstance(output, tuple) else output]

        return hook

    handles = [
        module.register_forward_hook(keep(into))
        for module, into in zip(modules, outputs, strict=True)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
