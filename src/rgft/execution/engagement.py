"""The engagement check: was the plan really carried out?

The commonest complaint about systems that freeze is that they silently do nothing. After a plan has
been put in force this watches the steps up to the next decision and says what defeated it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rgft.components import partition
from rgft.errors import EngagementError, warn
from rgft.execution.binding import Binding
from rgft.execution.relative_rates import chooses_its_rate
from rgft.plan import Plan
from rgft.processes import Processes
from rgft.shards import local

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# 4 bytes are summed modulo 2^32: for widening them as it sums, a CPU takes 20 times as long
SUMMED_IN = {1: torch.int64, 2: torch.int64, 4: torch.int32, 8: torch.int64}
LEAST_RELATIVE = 1e-9  # the first rate of Adafactor that warms up by itself, for weights of 0
CHUNK = 2**18  # elements: temporaries stay in the cache


def fingerprints(
    binding: Binding, state: Mapping[Tensor, Mapping[str, Any]] | None = None
) -> Tensor:
    """Sum of the bit patterns of each piece, int64 `[n]`: equal bits give equal sums.

    Args:
        binding: The pieces.
        state: That of a schedule-free optimizer, whose `eval()` and `train()` move all weights to
            their average and back, with rounding: its own sequence `z` moves in steps alone.
    """
    held = {} if state is None else state
    sums = [
        _fingerprint(
            piece.held.of(local(held[piece.parameter]["z"]))
            if "z" in held.get(piece.parameter, ())
            else piece.weight
        )
        for piece in binding.pieces
    ]
    return torch.stack([s.to(binding.device, torch.int64, non_blocking=True) for s in sums])


def _fingerprint(weight: Tensor) -> Tensor:
    size = weight.element_size()
    return weight.view(BITS[size]).sum(dtype=SUMMED_IN[size])


class Engagement:
    """Checks one plan at a time, from when it is put in force to the next decision.

    Frozen components must keep their bits and have no gradient, trained ones must move, and no
    activation below the boundary may require a gradient (then backward would go on below it).

    Args:
        model: The model that trains.
        binding: Its adaptable components.
        mode: "error", "warn" or "off".
        optimizer: Whose steps are watched.

    Attributes:
        processes: Those that train the model together, if there are several: all judge alike, and
            whatever they do not share parts of has to be the same in all.
        paused: While frozen components are probed, activations do require a gradient.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, mode: str, optimizer: torch.optim.Optimizer
    ) -> None:
        averages = any("train_mode" in group for group in optimizer.param_groups)
        self._optimizer = optimizer if averages else None
        self._model = model
        self._binding = binding
        self._mode = mode
        self._handles: list[RemovableHandle] = []
        self._plan: Plan | None = None
        self._before = torch.empty(0)
        self._expected = torch.empty(0)
        self._problems: dict[str, None] = {}
        self._received: set[int] = set()  # pieces with a gradient
        self._held: Tensor | None = None
        self._stepped = False
        self._looked = False
        self._open = False  # whether a trained module has run in the present forward pass
        self.processes: Processes | None = None
        self.paused = False

    def begin(self, plan: Plan) -> None:
        """Watch `plan`, which is in force from the next forward pass on."""
        if self._mode == "off":
            return
        self.end()
        self._plan = plan
        self._before = self._fingerprints()
        self._expected = torch.zeros(
            len(self._binding.pieces), dtype=torch.bool, device=self._before.device
        )
        self._received, self._held = set(), None
        self._stepped = self._looked = False
        self._watch_modules(plan)

    def end(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._plan = None
        self._problems = {}

    def _watch_modules(self, plan: Plan) -> None:
        """Look at what frozen modules put out that run before any trained one."""
        below, trained = _sides(self._model, self._binding, plan)
        hooks = [module.register_forward_hook(self._watch(name)) for name, module in below]
        if below:
            self._open = False
            hooks.append(self._model.register_forward_pre_hook(lambda *_: self._set_open(False)))
            hooks += [m.register_forward_pre_hook(lambda *_: self._set_open(True)) for m in trained]
        self._handles += hooks

    def _set_open(self, value: bool) -> None:
        self._open = value

    def before_step(
        self, optimizer: torch.optim.Optimizer, valid: Tensor | None, *, probing: bool
    ) -> None:
        """Look at the gradients that the optimizer is about to use.

        Args:
            optimizer: Its groups hold the scheduled learning rates.
            valid: Bool scalar on the device; False for a step that gradient scaling rejects.
            probing: Whether frozen components have a gradient on purpose.
        """
        if self._plan is None or self._looked:
            return
        self._stepped = True
        groups = optimizer.param_groups
        learning_rate = {p: _rate(group) for group in groups for p in group["params"]}
        moves = any(_positive(rate) for rate in learning_rate.values())
        self._looked = moves and not probing and valid is None
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
            self._received.update(grads)
            moving = []
            for i, grad in grads.items():
                piece = self._binding.pieces[i]
                scale = self._plan.lr_scale[piece.component]
                moving.append(_moves(piece.weight, grad, learning_rate[piece.parameter] * scale))
            shown = torch.stack([m.to(self._before.device) for m in moving])
            self._expected[list(grads)] |= shown if valid is None else shown & valid

    def hold(self) -> None:
        """What changes from now on is not of the plan: it is judged by what it has done so far."""
        self._held = self.result()

    def _fingerprints(self) -> Tensor:
        optimizer = self._optimizer  # loading a state replaces its `state`
        return fingerprints(self._binding, None if optimizer is None else optimizer.state)

    def result(self) -> Tensor:
        """Per piece, whether it changed and whether it should have: int64 `[2n]`, on the device.

        With several processes: in any of them, and whether it is not the same in all, `[3n]`.
        """
        if self._plan is None or not self._stepped:
            return torch.empty(0)
        if self._held is not None:
            return self._held
        now = self._fingerprints()
        found = torch.cat([now != self._before, self._expected]).long()
        if self.processes is None:
            return found
        # the greatest value and the least: where they differ, processes do
        sums = torch.zeros_like(now) if self._binding.sharded else now
        found = self.processes.greatest(torch.cat([found, sums, ~sums]))
        count = len(now)
        differ = found[2 * count : 3 * count] != ~found[3 * count :]
        return torch.cat([found[: 2 * count], differ.long()])

    def judge(self, result: Tensor) -> None:
        """Say what went wrong, given `result` on the host; then stop watching.

        Raises:
            EngagementError: The plan was not carried out and the mode is "error".
        """
        if self._plan is None or not len(result):
            return
        changed, expected, *differ = torch.split(result.bool(), len(self._binding.pieces))
        problems = [*self._problems, *self._movement(changed, expected), *self._silence()]
        problems += [p for flags in differ for p in self._difference(flags)]
        if self.processes is not None:  # what one has seen stops all
            problems = list(dict.fromkeys(p for p in self.processes.lists(problems)))
        self.end()
        if problems:
            message = "the plan was not carried out: " + "; ".join(problems[:3])
            if self._mode == "error":
                raise EngagementError(message + '. Config(engagement="warn") goes on regardless')
            warn(message)

    def _movement(self, changed: Tensor, expected: Tensor) -> list[str]:
        """Frozen pieces that changed; trained ones of which none did."""
        assert self._plan is not None
        trained = self._plan.trained
        frozen = torch.tensor([not trained[p.component] for p in self._binding.pieces])
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

    def _difference(self, differ: Tensor) -> list[str]:
        """Parameters that are not the same in all processes."""
        found = [self._binding.pieces[i].slice.parameter for i in torch.nonzero(differ).flatten()]
        return [
            f"parameter '{name}' is not the same in all processes (was it frozen when "
            "DistributedDataParallel was built, or is it stepped without its gradient reduced?)"
            for name in found[:1]
        ]

    def _silence(self) -> list[str]:
        """Whether all that was to train in the layers is without a gradient."""
        assert self._plan is not None
        pieces, trained = self._binding.pieces, self._plan.trained
        layers = [c for c in partition(self._model, "layer") if c.kind == "layer"]
        layered = {part.parameter for component in layers for part in component.slices}
        body = {
            i
            for i, piece in enumerate(pieces)
            if trained[piece.component] and piece.slice.parameter in layered
        }
        if body and not body & self._received:
            name = self._plan.components[pieces[min(body)].component].name
            return [
                f"no gradient reached any trained layer ('{name}', ...); reentrant gradient "
                "checkpointing does this: pass use_reentrant=False"
            ]
        return []

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            if (
                not (self.paused or self._open)
                and torch.is_grad_enabled()
                and any(t.requires_grad for t in _tensors(output))
            ):
                self._problems[
                    "backward does not stop below the plan's boundary: the output of frozen "
                    f"'{name}' requires a gradient (enable_input_require_grads, a hook, or inputs "
                    "that require one)"
                ] = None

        return hook


def _rate(group: dict[str, Any]) -> Any:
    """What the next step moves by at least."""
    if group.get("silent_sgd_phase"):
        return 0.0  # the first steps of a schedule-free RAdam move nothing
    return LEAST_RELATIVE if chooses_its_rate(group) else group["lr"]


def _positive(rate: Any) -> bool:
    """Whether a learning rate is known to be above 0; one in a tensor is on the device."""
    return not isinstance(rate, Tensor) and rate > 0


def _any_trained(binding: Binding, parameter: nn.Parameter, trained: tuple[bool, ...]) -> bool:
    return any(trained[binding.pieces[i].component] for i in binding.pieces_of[parameter])


def _moves(weight: Tensor, grad: Tensor, rate: Any) -> Tensor:
    """Whether a step is large enough for some weight to show it, bool scalar on the device.

    At the start of a warm-up of the learning rate, updates of half-precision weights round to 0.
    """
    precision = torch.finfo(weight.dtype).eps
    shows = []
    chunks = (torch.split(t.flatten(), CHUNK) for t in (grad, weight))
    for g, w in zip(*chunks, strict=True):
        step = g.float().abs().clamp_(max=1).mul_(rate)
        shows.append((step > w.float().abs().mul_(precision)).any())
    return torch.stack(shows).any()


def _sides(
    model: nn.Module, binding: Binding, plan: Plan
) -> tuple[list[tuple[str, nn.Module]], list[nn.Module]]:
    """Modules below the boundary with nothing trained in them; modules that own what trains."""
    on, boundary = plan.trained, plan.boundary  # each looks through all components
    trained = {id(p) for p in binding.parameters.values() if _any_trained(binding, p, on)}
    below = {
        piece.slice.parameter.rpartition(".")[0]
        for piece in binding.pieces
        if plan.components[piece.component].depth < boundary
    }
    frozen = [(name, model.get_submodule(name)) for name in sorted(below)]
    return (
        [(name, m) for name, m in frozen if not any(id(p) in trained for p in m.parameters())],
        [m for m in model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))],
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return (
        [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []
    )
