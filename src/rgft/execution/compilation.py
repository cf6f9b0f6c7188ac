"""Models that `torch.compile` has compiled as a whole."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rgft.errors import warn


def compiled_whole(model: nn.Module) -> bool:
    """Whether the model itself is compiled, and not its layers alone."""
    # a method stands there for a prefix cache
    return hasattr(model, "_orig_mod") or type(model._compiled_call_impl) is FunctionType


def watch_compiling(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Say what plans that freeze cost where the whole model is compiled, now or by the first step.

    The loop may have compiled a wrapper around the model, which only the wrapper knows of.
    """
    if compiled_whole(model):
        _warn()
        return []
    waiting = [True]  # handles cannot be removed while hooks run
    found = weakref.ref(model)  # the optimizer keeps the hook, and must not keep the model

    def look(*given: Any) -> None:
        del given
        if waiting and (held := found()) is not None and (compiled_whole(held) or _wrapped(held)):
            _warn()
        waiting.clear()

    disable: Callable[..., Any] = torch.compiler.disable
    return [optimizer.register_step_pre_hook(disable(look))]


def _wrapped(model: nn.Module) -> bool:
    """Whether there is a compiled module around the model, used or not."""
    from torch._dynamo.eval_frame import OptimizedModule  # noqa: PLC0415 - seconds to import

    return any(
        type(thing) is OptimizedModule and any(module is model for module in thing.modules())
        for thing in gc.get_objects()
    )


def _warn() -> None:
    warn(
        "the model is compiled as a whole, so that each plan that freezes something else compiles "
        "it anew, and after 8 of them (torch._dynamo.config.recompile_limit) new ones run "
        "uncompiled; compile its layers instead (layer.compile())"
    )
