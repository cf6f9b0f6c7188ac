"""Models that `torch.compile` has compiled as a whole."""

from __future__ import annotations

from types import FunctionType

from torch import nn

from rgft.errors import warn


def compiled_whole(model: nn.Module) -> bool:
    """Whether the model itself is compiled, and not its layers alone."""
    # a method stands there for a prefix cache
    return hasattr(model, "_orig_mod") or type(model._compiled_call_impl) is FunctionType


def warn_of_compiling_anew() -> None:
    """Say what plans that freeze cost where the whole model is compiled."""
    warn(
        "the model is compiled as a whole, so that each plan that freezes something else compiles "
        "it anew, and after 8 of them (torch._dynamo.config.recompile_limit) new ones run "
        "uncompiled; compile its layers instead (layer.compile())"
    )
