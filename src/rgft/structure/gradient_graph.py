"""The way of the gradient through a model: autograd's graph of a forward pass, in numbers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

Forward = Callable[[nn.Module], Any]
Names = Mapping[int, str]
_SUM = "AddBackward0"


@dataclass(frozen=True, slots=True)
class GradientGraph:
    """Operations of a forward pass by number, each after all that it is computed from.

    Attributes:
        inputs: What each operation reads that has a gradient: numbers of operations.
        sums: Those that add two tensors.
        parameters: Name of the parameter that a leaf is.
        results: Where backward starts: the loss, or all outputs where there is none.
        returned: Each (module, operation whose result it returned), in order of return.
    """

    inputs: tuple[tuple[int, ...], ...]
    sums: tuple[int, ...]
    parameters: Mapping[int, str]
    results: tuple[int, ...]
    returned: tuple[tuple[str, int], ...]

    def with_gradient(self, without: Collection[int] = ()) -> frozenset[str]:
        """Parameters that get a gradient if the results of the operations `without` are detached.

        Args:
            without: Numbers of operations.
        """
        return self.parameters_below(set(self.results), without)

    def parameters_below(
        self, operations: Collection[int], without: Collection[int] = ()
    ) -> frozenset[str]:
        """Parameters that the results of some operations depend on."""
        below = self._below(operations, 0, set(without))
        return frozenset(self.parameters[i] for i in below if i in self.parameters)

    def depends(self, operation: int, on: int) -> bool:
        """Whether the result of one operation is computed from that of another, or is it."""
        return on in self._below([operation], on, set())

    def _below(self, start: Iterable[int], lowest: int, without: set[int]) -> set[int]:
        """Operations from `lowest` on that some are computed from, themselves included."""
        seen = set(start) - without
        stack = list(seen)
        while stack:
            for i in self.inputs[stack.pop()]:
                if i >= lowest and i not in seen and i not in without:
                    seen.add(i)
                    stack.append(i)
        return seen


def gradient_graph(model: nn.Module, forward: Forward, names: Names) -> GradientGraph:
    """The graph of `forward(twin)`, all parameters requiring a gradient.

    The twin shares the weights of the model, has no hooks and is in evaluation mode, so that
    neither the model, its buffers nor the random state change.

    Args:
        model: Without wrappers.
        forward: Runs the twin and returns its output or the loss.
        names: Of the parameters, by id.
    """
    twin, names = _twin(model, names)
    returned: list[tuple[str, Any]] = []
    for path, module in twin.named_modules():
        if path:
            module.register_forward_hook(_noting(path, returned))
    return _numbered(_results(forward, twin), names, returned)


def parameters_with_gradient(
    model: nn.Module, forward: Forward, names: Names, detached: Collection[str]
) -> frozenset[str]:
    """Parameters that get a gradient in `forward(twin)` if some modules detach what they return."""
    twin, names = _twin(model, names)
    for path in detached:
        twin.get_submodule(path).register_forward_hook(lambda _, __, output: detach(output))
    return _numbered(_results(forward, twin), names, []).with_gradient()


def main_tensor(output: Any) -> Tensor | None:
    """What a module returns, or the first of what it returns."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def detach(output: Any) -> Any:
    """The output of a module with its main tensor detached."""
    if isinstance(output, Tensor):
        return output.detach()
    first = main_tensor(output)
    if first is None:
        return output
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: first.detach()})
    return type(output)([first.detach(), *output[1:]])


def _twin(model: nn.Module, names: Names) -> tuple[nn.Module, Names]:
    """A copy that shares the weights, and the names of its own parameters."""
    memo: dict[int, Any] = {}
    own_names: dict[int, str] = {}
    for parameter in model.parameters():
        # quantised weights have no gradient, and classes of their own
        floating = parameter.is_floating_point()
        own = nn.Parameter(parameter.detach()) if floating else parameter
        memo[id(parameter)] = own
        own_names[id(own)] = names[id(parameter)]
    for module in model.modules():  # hooks are not even copied: they may hold an optimizer
        hooks = (value for key, value in vars(module).items() if "_hooks" in key)
        memo.update((id(value), OrderedDict()) for value in hooks if isinstance(value, OrderedDict))
    twin = copy.deepcopy(model, memo).eval()
    twin.register_forward_pre_hook(_differentiable, with_kwargs=True)
    return twin, own_names


def _differentiable(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Inputs with a gradient: the lowest skip connection may start at them."""
    del module

    def required(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, required, (args, kwargs))


def _noting(path: str, returned: list[tuple[str, Any]]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        tensor = main_tensor(output)
        returned.append((path, None if tensor is None else tensor.grad_fn))

    return note


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients on; the random state is put back."""
    with torch.random.fork_rng(), torch.enable_grad():
        yield


def _results(forward: Forward, twin: nn.Module) -> list[Any]:
    with _undisturbed():
        output = forward(twin)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    tensors = [loss] if isinstance(loss, Tensor) else tree_flatten(output)[0]
    return [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]


def _numbered(results: list[Any], names: Names, returned: list[tuple[str, Any]]) -> GradientGraph:
    """The graph under some results; what modules returned outside of it has the number -1."""
    number: dict[Any, int] = {}
    order: list[tuple[Any, list[Any]]] = []
    stack = [(node, False) for node in results]
    while stack:
        node, done = stack.pop()
        if node in number:
            continue
        below = [following for following, _ in node.next_functions if following is not None]
        if done:
            number[node] = len(order)
            order.append((node, below))
        else:
            stack.append((node, True))
            stack.extend((following, False) for following in below if following not in number)
    leaves = {i: getattr(node, "variable", None) for i, (node, _) in enumerate(order)}
    return GradientGraph(
        tuple(tuple(number[following] for following in below) for _, below in order),
        tuple(i for i, (node, below) in enumerate(order) if _adds(node, below)),
        {i: names[id(leaf)] for i, leaf in leaves.items() if id(leaf) in names},
        tuple(number[node] for node in results),
        tuple((path, number.get(node, -1)) for path, node in returned),
    )


def _adds(node: Any, below: list[Any]) -> bool:
    return len(below) == 2 and node.name() == _SUM
