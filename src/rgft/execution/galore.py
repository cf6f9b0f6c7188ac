r"""GaLore: Adam in a subspace of the gradient of each matrix (Zhao et al. 2024).

For a weight :math:`W` of shape :math:`m \times n`, every :math:`T` steps the first :math:`r`
singular vectors of its gradient become the basis :math:`P` of the shorter side. Then

.. math:: R = P^\top G, \qquad W \leftarrow (1 - \eta \lambda) W - \eta \alpha P \, \mathrm{Adam}(R)

for :math:`m < n`, else :math:`R = G P`. Adam's averages stay as they are when the basis is renewed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from rgft.errors import InputError
from rgft.rules import POSITIVE, Rule, whole
from rgft.structure.architecture import outline
from rgft.structure.layers import is_linear

UNPROJECTED = ("embedding", "head", "lm_head")


@dataclass(frozen=True, slots=True)
class Projection:
    """What gradients are projected to.

    Attributes:
        rank: r, of the subspace.
        every: T, steps from one subspace to the next.
        scale: alpha, of the projected updates.
    """

    rank: int = 8
    every: int = 200
    scale: float = 2.0


PROJECTION_RULES: dict[str, Rule] = {"rank": whole(1), "every": whole(1), "scale": POSITIVE}


def projected_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers but those of embeddings and heads.

    Raises:
        InputError: There are none.
    """
    inner = [part for part in outline(model) if part.kind not in UNPROJECTED]
    own = {id(parameter) for part in inner for parameter in part.parameters}
    maps: list[Any] = [module for module in model.modules() if is_linear(module)]
    found = {id(m.weight): m.weight for m in maps if id(m.weight) in own}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear layers but its head, and GaLore is for those; "
            "give another --method"
        )
    return list(found.values())


def check_rank(weights: Collection[nn.Parameter], rank: int) -> None:
    """Refuse a rank that projects nothing.

    Raises:
        InputError: No matrix has a shorter side above it.
    """
    most = max(min(weight.shape) for weight in weights)
    if rank >= most:
        raise InputError(
            f"galore_rank is {rank}; allowed: below {most}, the longest of the shorter sides of "
            "this model's matrices"
        )


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW that sees some weights' gradients in a subspace.

    Its state is in tensors alone, so that it is saved and loaded as that of AdamW is.

    Args:
        params: Parameters, or groups of them; a group is split where it has weights of both kinds.
        projected: Weights that are projected, each a matrix.
        projection: To what.
        lr: Learning rate.
        betas: Smoothing of gradients and of their squares.
        eps: Added to the root of the squares.
        weight_decay: Of the weights themselves, times the learning rate.
    """

    def __init__(  # noqa: PLR0913 - AdamW's, and two more
        self,
        params: Iterable[Any],
        projected: Collection[nn.Parameter],
        projection: Projection,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        ids, given = {id(weight) for weight in projected}, list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        split: list[dict[str, Any]] = []
        for group in groups:
            for settings in ({"rank": None}, asdict(projection)):
                kind = settings["rank"] is not None
                held = [p for p in group["params"] if (id(p) in ids) == kind]
                split += [{**group, **settings, "params": held}] if held else []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(split, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if group["rank"] is None:
                self._adam(group, held, held, [p.grad for p in held])
            else:
                self._projected(group, held)
        return loss

    def _projected(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        """Adam on the projected gradients, from 0, is the update to be lifted."""
        inside = [_project(p.grad, self._basis(p, group)) for p in weights if p.grad is not None]
        moved = [torch.zeros_like(gradient) for gradient in inside]
        self._adam(group | {"lr": 1.0, "weight_decay": 0.0}, weights, moved, inside)
        for weight, update in zip(weights, moved, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            lifted = _lift(update, self.state[weight]["basis"], weight.shape)
            weight.add_(lifted, alpha=group["lr"] * group["scale"])

    def _basis(self, weight: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The basis for this step, renewed if it is time."""
        state = self.state[weight]
        if not state or int(state["step"]) % group["every"] == 0:
            assert weight.grad is not None
            state["basis"] = _subspace(weight.grad, group["rank"])
        basis: Tensor = state["basis"]
        return basis

    def _adam(
        self, group: dict[str, Any], owners: list[Any], moved: list[Any], gradients: list[Any]
    ) -> None:
        """Adam's step of `moved`, with the state of `owners`."""
        for owner, gradient in zip(owners, gradients, strict=True):
            state = self.state[owner]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(gradient)
                state["exp_avg_sq"] = torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        states = [self.state[owner] for owner in owners]
        adamw(
            moved,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _subspace(gradient: Tensor, rank: int) -> Tensor:
    """The first singular vectors of the shorter side, `[m or n, r]`; of the right one if square."""
    exact = gradient if gradient.dtype == torch.float64 else gradient.float()
    if exact.isfinite().all():
        left, _, right = torch.linalg.svd(exact, full_matrices=False)
    else:  # the run then ends as it would under AdamW
        left = right = torch.full_like(exact, torch.nan)
    basis: Tensor = left[:, :rank] if gradient.shape[0] < gradient.shape[1] else right[:rank].T
    return basis.to(gradient.dtype).contiguous()


def _project(gradient: Tensor, basis: Tensor) -> Tensor:
    return basis.T @ gradient if gradient.shape[0] < gradient.shape[1] else gradient @ basis


def _lift(update: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    return basis @ update if shape[0] < shape[1] else update @ basis.T
