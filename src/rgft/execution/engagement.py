"""The engagement check: was the plan really carried out?

The commonest complaint about systems that freeze is that they silently do nothing. After a plan has
been put in force this watches the steps up to the next decision and says what defeated it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rgft.errors import EngagementError
from rgft.execution.binding import Binding
from rgft.plan import Plan

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(binding: Binding) -> Tensor:
    """Sum of the bit patterns of each piece, int64 `[n]`: equal bits give equal sums."""
    sums = [p.weight.view(BITS[p.weight.element_size()]).sum() for p in binding.pieces]
    return torch.stack([s.to(binding.device, non_blocking=True) for s in sums])


class Engagement:
    """Checks one plan at a time, from when it is put in force to the next decision.

    Frozen components must keep their bits and have no gradient, trained ones must move, and no
    activation below the boundary may require a gradient (then backward would go on below it).

    Args:
        model: The model that trains.
        binding: Its adaptable components.
        mode: "error", "warn" or "off".
    """

    def __init__(self, model: nn.Module, binding: Binding, mode: str) -> None:
        self._model = model
        self._binding = binding
        self._mode = mode
        self._handles: list[RemovableHandle] = []
        self._plan: Plan | None = None
        self._before = torch.empty(0)
        self._expected = torch.empty(0)
        self._problems: dict[str, None] = {}
        self._received: set[int] = set()
        self._stepped = False
        self._looked = False
        self.paused = False  # while frozen components are probed, activations do require a gradient

    def begin(self, plan: Plan) -> None:
        """Watch `plan`, which is in force from the next forward pass on."""
        if self._mode == "off":
            return
        self.end()
        self._plan = plan
        self._before = fingerprints(self._binding)
        self._expected = torch.zeros(
            len(self._binding.pieces), dtype=torch.bool, device=self._before.device
        )
        self._received = set()
        self._stepped = self._looked = False
        for name, module in _modules_below(self._model, self._binding, plan):
            self._handles.append(module.register_forward_hook(self._watch(name)))

    def end(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._plan = None
        self._problems = {}

    def before_step(self, optimizer: torch.optim.Optimizer, *, probing: bool) -> None:
        """Look at the gradients that the optimizer is about to use."""
        if self._plan is None or self._looked:
            return
        self._stepped = True
        groups = optimizer.param_groups
        learning_rate = {p: group["lr"] for group in groups for p in group["params"]}
        self._looked = not probing and any(_positive(rate) for rate in learning_rate.values())
        trained = self._plan.trained
        grads: dict[int, Tensor] = {}
        for index, piece in enumerate(self._binding.pieces):
            if piece.parameter.grad is None:
                continue
            if trained[piece.component]:
                grads[index] = piece.grad
            elif not probing and not _any_trained(self._binding, piece.parameter, trained):
                self._problems[
                    f"frozen parameter '{piece.slice.parameter}' received a gradient "
                    "(something set requires_grad or grad after the plan was applied)"
                ] = None
        if grads:
            self._received.update(self._binding.pieces[i].component for i in grads)
            rates = [learning_rate[self._binding.pieces[i].parameter] for i in grads]
            sizes = torch._foreach_norm(list(grads.values()), torch.inf)
            moving = [size * rate > 0 for size, rate in zip(sizes, rates, strict=True)]
            self._expected[list(grads)] |= torch.stack([m.to(self._before.device) for m in moving])

    def result(self) -> Tensor:
        """Per piece, whether it changed and whether it should have: int64 `[2n]`, on the device."""
        if self._plan is None or not self._stepped:
            return torch.empty(0)
        changed = fingerprints(self._binding) != self._before
        return torch.cat([changed, self._expected]).long()

    def judge(self, result: Tensor) -> None:
        """Say what went wrong, given `result` on the host; then stop watching.

        Raises:
            EngagementError: The plan was not carried out and the mode is "error".
        """
        if self._plan is None or not len(result):
            return
        changed, expected = result.bool().chunk(2)
        problems = [*self._problems, *self._movement(changed, expected), *self._silence()]
        self.end()
        if problems:
            message = "the plan was not carried out: " + "; ".join(problems[:3])
            if self._mode == "error":
                raise EngagementError(message + '. Config(engagement="warn") goes on regardless')
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _movement(self, changed: Tensor, expected: Tensor) -> list[str]:
        """Frozen pieces that changed; trained ones of which none did."""
        assert self._plan is not None
        frozen = torch.tensor([not self._plan.trained[p.component] for p in self._binding.pieces])
        moved = [
            self._binding.pieces[i].slice.parameter
            for i in torch.nonzero(changed & frozen).flatten()
        ]
        problems = [
            f"frozen parameter '{name}' changed (is there a second optimizer?)"
            for name in moved[:1]
        ]
        if expected.any() and not (changed & expected).any():
            problems.append(
                "no trained parameter moved, although gradients and learning rate are not 0"
            )
        return problems

    def _silence(self) -> list[str]:
        """Whether all that was to train, but for new heads, is without a gradient."""
        assert self._plan is not None
        body = {
            i
            for i, (c, on) in enumerate(zip(self._plan.components, self._plan.trained, strict=True))
            if on and c.kind != "head"
        }
        if body and not body & self._received:
            name = self._plan.components[min(body)].name
            return [
                f"no gradient reached any trained component ('{name}', ...); reentrant gradient "
                "checkpointing does this: pass use_reentrant=False"
            ]
        return []

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            if (
                not self.paused
                and torch.is_grad_enabled()
                and any(t.requires_grad for t in _tensors(output))
            ):
                self._problems[
                    f"backward does not stop below the plan's boundary: the output of frozen '{name}' "
                    "requires a gradient (enable_input_require_grads, a hook, or inputs that require one)"
                ] = None

        return hook


def _positive(rate: Any) -> bool:
    """Whether a learning rate is known to be above 0; one in a tensor is on the device."""
    return not isinstance(rate, Tensor) and rate > 0


def _any_trained(binding: Binding, parameter: nn.Parameter, trained: tuple[bool, ...]) -> bool:
    return any(trained[binding.pieces[i].component] for i in binding.pieces_of[parameter])


def _modules_below(model: nn.Module, binding: Binding, plan: Plan) -> list[tuple[str, nn.Module]]:
    """Modules whose own parameters all lie below the boundary."""
    below = {
        piece.slice.parameter
        for piece in binding.pieces
        if plan.components[piece.component].depth < plan.boundary
    }
    owners = {name.rpartition(".")[0] for name in below}
    return [(name, model.get_submodule(name)) for name in sorted(owners)]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return (
        [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []
    )
