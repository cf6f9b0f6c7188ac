"""Standing between a module and its callers, and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rgft.errors import InputError

Call = Callable[..., Any]
Around = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Lets a function decide what a call of a module does, its hooks included.

    It takes the place that torch has for a compiled call, which is left out of copies, pickles and
    state dicts of the module; a call that is compiled is gone around.

    Args:
        module: Whose calls are taken.
        around: Gets the call as it would be, and its arguments.

    Raises:
        InputError: Another interception is there.
    """

    def __init__(self, module: nn.Module, around: Around) -> None:
        if isinstance(getattr(module._compiled_call_impl, "__self__", None), Interception):
            raise InputError("the model has a prefix cache already; close() that one first")
        self._module = module
        self._around = around
        self._inner: Call | None = None
        self._outer = self._take
        self.renew()

    def renew(self) -> None:
        """Go around a call that was compiled since."""
        if self._module._compiled_call_impl is not self._outer:
            self._inner = self._module._compiled_call_impl
            self._module._compiled_call_impl = self._outer

    def remove(self) -> None:
        """Leave the module as it was."""
        if self._module._compiled_call_impl is not self._outer:
            return
        if self._inner is None:
            del self._module._compiled_call_impl
        else:
            self._module._compiled_call_impl = self._inner

    def _take(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._inner or self._module._call_impl, args, kwargs)


class Evaluation:
    """Modules in evaluation mode until `end`, which leaves each as it was."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules: list[nn.Module] = []
        self.begin(modules)

    def begin(self, modules: Iterable[nn.Module]) -> None:
        """Put modules that train into evaluation mode."""
        for module in modules:
            if module.training:
                module.training = False
                self._modules.append(module)

    def end(self) -> None:
        """Put them back."""
        for module in self._modules:
            module.training = True
        self._modules.clear()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; random numbers go on as if nothing had happened."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    evaluation = Evaluation(model.modules())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        evaluation.end()
        # older releases go on using weights cast without a gradient (pytorch#105211)
        torch.clear_autocast_cache()
