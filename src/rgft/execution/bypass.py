"""Bypass: the gradient takes the skip connection around a branch that does not train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rgft.structure.gradient_graph import detach
from rgft.structure.layers import unwrapped
from rgft.structure.residual_branches import ResidualBranches


class Bypass:
    r"""Lets the gradient take the skip connections around chosen components.

    The output of a residual branch is detached before it is added:

    .. math:: h = x + f(x) \quad\text{with}\quad \frac{\partial h}{\partial x} := I

    so that backward computes neither weight nor input gradients in :math:`f`, wherever it lies.
    Values of the forward pass do not change; gradients of what lies below become approximate
    (Woo et al. 2024, "DropBP"). Parameters in a bypassed branch get no gradient (None), its norms
    included; `branches.without_gradient` lists them.

    It acts while the model is in training mode and gradients are on, from the next forward pass;
    set it between steps, not between a forward pass and its backward. Nothing of it is in the
    state of the model; a copy of the model is bypassed as the model was when it was copied.

    Compiled code is compiled again for each new set: PyTorch is told to look at hooks
    (`torch._dynamo.config.skip_nnmodule_hook_guards`), which by default it does not, and the first
    `set` drops what was compiled before.

    Args:
        model: The model that trains, wrapped or not.
        branches: Its branches, from `residual_branches`.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> from rgft import partition, residual_branches
        >>> example = torch.zeros(3, 1, 8)
        >>> branches = residual_branches(model, partition(model, "layer"), lambda m: m(example))
        >>> bypass = Bypass(model, branches)
        >>> bypass.set(["layers.1"])
        >>> model(torch.randn(3, 1, 8)).sum().backward()
        >>> model.layers[1].linear1.weight.grad is None, model.layers[0].linear1.weight.grad is None
        (True, False)
        >>> bypass.close()
    """

    def __init__(self, model: nn.Module, branches: ResidualBranches) -> None:
        self.branches = branches
        self._components: tuple[str, ...] = ()
        self._detachment = Detachment(model)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of what is bypassed."""
        return self._components

    def set(self, components: Iterable[str]) -> None:
        """Bypass these components and no others.

        Args:
            components: Names of components.

        Raises:
            InputError: A component is not one that can be bypassed; all stays as it was.
        """
        names = tuple(dict.fromkeys(components))
        self._detachment.set(self.branches.of(names))
        self._components = names

    def close(self) -> None:
        """Bypass nothing."""
        self._detachment.close()
        self._components = ()


class Detachment:
    """Lets no gradient through what some modules of a model return, while it trains.

    Args:
        model: The model that trains, wrapped or not.

    Attributes:
        modules: Paths of the modules at present, in the model without its wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: tuple[str, ...] = ()
        self._model = unwrapped(model)
        self._handles: list[RemovableHandle] = []

    def set(self, modules: Sequence[str]) -> None:
        """Detach these modules and no others."""
        self.close()
        if modules:
            _have_compiled_code_look_at_hooks()
        self.modules = tuple(modules)
        hook = _Detaching(self._model)
        self._handles = [
            self._model.get_submodule(path).register_forward_hook(hook) for path in modules
        ]

    def close(self) -> None:
        """Detach nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.modules = ()


def is_bypassed(model: nn.Module) -> bool:
    """Whether some branch of the model is bypassed at present."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, _Detaching) for hook in hooks)


def _have_compiled_code_look_at_hooks() -> None:
    """Else a graph that was compiled without the hook goes on running, and nothing is bypassed."""
    from torch._dynamo import config  # noqa: PLC0415 - seconds to import

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


@dataclass(frozen=True, slots=True)
class _Detaching:
    """Forward hook of the module that ends a branch; a copy of the model gets one of its own."""

    model: nn.Module  # its mode counts: single norms and dropouts are often put in evaluation mode

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        return detach(output) if self.model.training and torch.is_grad_enabled() else output
