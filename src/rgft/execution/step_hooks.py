"""Looking at what an optimizer is about to do, and at what it has done, once a step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rgft.errors import InputError

# `before(optimizer, inverse_scale, valid)`: what gradients still have to be multiplied by, and
# whether they are finite, on the device, for a fused optimizer under gradient scaling; else None
Before = Callable[[torch.optim.Optimizer, Tensor | None, Tensor | None], None]
After = Callable[[torch.optim.Optimizer], None]


def watch_steps(
    optimizer: torch.optim.Optimizer, before: Before, after: After
) -> list[RemovableHandle]:
    """Call `before` and `after` around each step, until the handles are removed.

    A closure that `optimizer.step()` is given runs before `before`, so that there are gradients to
    look at; an optimizer that evaluates it again, such as LBFGS, gets an `InputError`.
    """
    watch = _StepWatch(before, after)
    # a step that is compiled would compile the guide with it, anew for each plan
    disable: Callable[..., Any] = torch.compiler.disable
    return [
        optimizer.register_step_pre_hook(disable(watch.before_step)),
        optimizer.register_step_post_hook(disable(watch.after_step)),
    ]


class _StepWatch:
    """Sees to it that a step counts once.

    An optimizer class whose step calls its parent's runs the hooks of both, one in the other.
    """

    def __init__(self, before: Before, after: After) -> None:
        self._before, self._after = before, after
        self._stepping: FrameType | None = None
        self._nested = 0

    def before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Any]] | None:
        if self._stepping is not None and _running(self._stepping):
            self._nested += 1
            return None
        _refuse_capture()
        self._stepping, self._nested = _caller(sys._getframe(1)), 0
        given = _with_closure_run(optimizer, args, kwargs)
        scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        self._before(
            optimizer,
            None if scale is None else scale.reciprocal(),
            None if found_inf is None else found_inf == 0,
        )
        return given

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._nested:
            self._nested -= 1
            return
        self._stepping = None
        self._after(optimizer)


def _refuse_capture() -> None:
    """Refuse a step that a graph would replay without its hooks."""
    begun: Callable[[], bool] = torch.cuda.is_initialized
    if begun() and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "the optimizer's step is being captured in a CUDA graph, which would replay it without "
            "the guide; capture forward and backward alone, and step outside of the graph"
        )


def _with_closure_run(
    optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """The arguments of `step` with a closure in its place that only tells what it returned."""

    def run(value: Any) -> Any:
        if not callable(value) or value is optimizer:
            return value
        with torch.enable_grad():
            loss = value()
        return _Told(loss)

    if not any(callable(a) and a is not optimizer for a in [*args, *kwargs.values()]):
        return None
    return tuple(run(a) for a in args), {name: run(a) for name, a in kwargs.items()}


class _Told:
    """A closure that has run already."""

    def __init__(self, loss: Any) -> None:
        self._loss, self._asked = loss, False

    def __call__(self) -> Any:
        if self._asked:
            raise InputError(
                "the optimizer evaluates its closure several times a step, which the guide cannot "
                "follow; use one that takes a single gradient, such as AdamW"
            )
        self._asked = True
        return self._loss


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper such as Accelerate's, whose hooks would never be called.

    Raises:
        InputError: It is none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    return inner


def _caller(frame: FrameType) -> FrameType:
    """The frame that called a hook, below those that keep it out of what is compiled."""
    while frame.f_globals.get("__name__") == "torch._dynamo.eval_frame" and frame.f_back:
        frame = frame.f_back
    return frame


def _running(frame: FrameType) -> bool:
    """Whether `frame` is among the callers (it is not, if an error ended it)."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
