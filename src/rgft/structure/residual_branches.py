"""Where the residual branches of a model end: whose output is added to the skip connection.

Nothing is known of model families. In the graph of the gradient a sum is looked for of which one
term is computed from another: :math:`h = x + f(x)`. The module that returned :math:`f(x)` ends the
branch; what has no gradient once it is detached, as autograd itself says, belongs to the branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from rgft.errors import InputError
from rgft.structure.gradient_graph import (
    Forward,
    GradientGraph,
    gradient_graph,
    parameters_with_gradient,
)
from rgft.structure.layers import unwrapped

if TYPE_CHECKING:
    from rgft.components import Component

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class ResidualBranches:
    """The residual branches of the components of a model.

    Attributes:
        modules: By component, the modules whose outputs are added to the skip connection; a layer
            has those of its blocks. Paths are those in the model without its wrappers.
        missing: By component that cannot be bypassed, why.
    """

    modules: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str]
    _graph: GradientGraph

    def of(self, components: Iterable[str]) -> tuple[str, ...]:
        """The modules to detach in order to bypass some components.

        Raises:
            InputError: A component is not one that can be bypassed.
        """
        found: dict[str, None] = {}
        for name in components:
            if name not in self.modules:
                raise InputError(
                    f"component {name!r} cannot be bypassed: "
                    f"{self.missing.get(name, 'the model has none of that name')}; "
                    f"{_choice(self.modules)}"
                )
            found.update(dict.fromkeys(self.modules[name]))
        return tuple(found)

    def without_gradient(self, components: Iterable[str]) -> frozenset[str]:
        """Parameters that get no gradient while some components are bypassed.

        Besides those of the components these are the norms inside the branches, and what feeds the
        loss through bypassed branches alone: an encoder whose every cross-attention is bypassed.

        Raises:
            InputError: A component is not one that can be bypassed.
        """
        modules = set(self.of(components))
        cut = {operation for path, operation in self._graph.returned if path in modules}
        return self._graph.with_gradient() - self._graph.with_gradient(cut)


def residual_branches(
    model: nn.Module, components: Sequence[Component], forward: Forward
) -> ResidualBranches:
    """Finds, for each component, the modules that end its residual branches.

    A component can be bypassed if all its matrices lie in residual branches, and these hold no
    matrices of another component. The answer is checked: with the modules found detached, autograd
    must reach exactly the parameters that it should.

    Args:
        model: Any module; wrappers are looked through.
        components: Those of `rgft.partition(model, granularity)`, such as "layer" or "block".
        forward: Runs the module that it is given on an example, `lambda m: m(**batch)`, and returns
            the output or the loss. One row is enough. It is called with a copy that shares the
            weights, in evaluation mode, without hooks.

    Returns:
        The branches, and for what has none the reason.

    Example:
        >>> import torch
        >>> from rgft.components import partition
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> found = residual_branches(
        ...     model, partition(model, "block"), lambda m: m(torch.zeros(3, 1, 8))
        ... )
        >>> found.modules["layers.0.attention"], found.modules["layers.0.feed_forward"]
        (('layers.0.dropout1',), ('layers.0.dropout2',))
    """
    core = unwrapped(model)
    names = {id(p): name for name, p in model.named_parameters()}
    wide = {name for name, p in model.named_parameters() if p.ndim > 1}
    owners = {
        piece.parameter: component.name
        for component in components
        for piece in component.slices
        if piece.dim is None
    }
    graph = gradient_graph(core, forward, names)
    measured = partial(parameters_with_gradient, core, forward, names)
    survey = _Survey(graph, frozenset(wide), owners, _trusted(graph, _ends(graph), measured))
    modules: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    for component in components:
        own = frozenset(name for name, owner in owners.items() if owner == component.name)
        found = survey.branches(own)
        problem = survey.problem(own, found)
        if problem:
            missing[component.name] = problem
        else:
            modules[component.name] = tuple(found)
    return ResidualBranches(modules, missing, graph)


class _Survey:
    """Which branches make up a component, and what is wrong with it if they do not."""

    def __init__(
        self,
        graph: GradientGraph,
        matrices: frozenset[str],
        owners: Mapping[str, str],
        ends: Mapping[str, set[int]],
    ) -> None:
        reached = graph.with_gradient()
        self._graph = graph
        self._reached = reached
        self._matrices = matrices & reached
        self._owners = owners
        self._ends = ends
        self._exclusive = {module: reached - _kept(graph, [module]) for module in ends}

    def branches(self, own: frozenset[str]) -> list[str]:
        """The outermost branches that hold matrices of `own` and of nothing else."""
        inside = {
            module: held
            for module, held in self._exclusive.items()
            if held & own & self._matrices and held & self._matrices <= own
        }
        return [m for m, held in inside.items() if not any(held < o for o in inside.values())]

    def problem(self, own: frozenset[str], found: Sequence[str]) -> str | None:
        """Why a component cannot be bypassed, or None if it can."""
        if not own:
            return "it is made of parts of matrices"
        if not own & self._reached:
            return "the loss of the example does not depend on it"
        inside = frozenset[str]().union(*map(self._inside, found))
        outside = sorted(own & self._matrices - inside)
        if found and not outside:
            return None
        for held in self._exclusive.values():
            others = (held & self._matrices) - own
            if held & own and others:
                return f"its residual branch also holds {self._owners.get(min(others), 'others')!r}"
        return f"no module returns a residual branch with {(outside or [min(own)])[0]!r} in it"

    def _inside(self, module: str) -> frozenset[str]:
        """Parameters between the start of a skip connection and the end of the branch."""
        returned = [i for path, i in self._graph.returned if path == module]
        return self._graph.parameters_below(returned, without=self._ends[module])


def _ends(graph: GradientGraph) -> dict[str, set[int]]:
    """The modules that end residual branches, in order of return, and where their skips start.

    Of the modules on the last way to the sum the one that returns least often is taken, so that a
    dropout that several branches share is passed over; then the nearest to the sum.
    """
    ways = [(start, list(_last_way(graph, term, start))) for term, start in _residual_terms(graph)]
    allowed = {operation for _, way in ways for operation in way}
    outside = {path for path, operation in graph.returned if operation not in allowed}
    calls = Counter(path for path, _ in graph.returned)
    returning: dict[int, list[str]] = {}
    for path, operation in reversed(graph.returned):
        returning.setdefault(operation, []).append(path)
    found: dict[str, set[int]] = {}
    for start, way in ways:
        paths = [path for operation in way for path in returning.get(operation, [])]
        fit = [path for path in paths if path not in outside]
        if fit:
            found.setdefault(min(fit, key=lambda path: calls[path]), set()).add(start)
    return {path: found[path] for path, _ in graph.returned if path in found}


def _residual_terms(graph: GradientGraph) -> Iterator[tuple[int, int]]:
    """Each term of a sum that is computed from another term, and where it parts from that one."""
    for operation in graph.sums:
        left, right = graph.inputs[operation]
        for branch, skip in ((left, right), (right, left)):
            for term in _summands(graph, branch):
                starts = (s for s in _skip_ways(graph, skip) if graph.depends(term, s))
                start = next(starts, None)
                if start is not None:
                    yield term, start


def _summands(graph: GradientGraph, operation: int) -> Iterator[int]:
    """The terms of nested sums: parallel branches may be added to each other first."""
    yield operation
    if operation in graph.sums:
        for term in graph.inputs[operation]:
            # what comes after a residual sum is the stream, not a branch
            if not any(graph.depends(term, o) for o in graph.inputs[operation] if o != term):
                yield from _summands(graph, term)


def _skip_ways(graph: GradientGraph, operation: int) -> Iterator[int]:
    """What the gradient of a skip connection gets to without passing a parameter, nearest first."""
    waiting = [operation]
    seen = {operation}
    while waiting:
        operation = waiting.pop(0)
        yield operation
        inputs = graph.inputs[operation]
        if len(inputs) == 1 or operation in graph.sums:
            waiting.extend(i for i in inputs if i not in seen)
            seen.update(inputs)


def _last_way(graph: GradientGraph, term: int, start: int) -> Iterator[int]:
    """From the sum back into the branch, as long as there is one way only."""
    operation = term
    while not graph.depends(start, operation):
        yield operation
        if len(graph.inputs[operation]) != 1:
            return
        (operation,) = graph.inputs[operation]


def _trusted(
    graph: GradientGraph,
    ends: dict[str, set[int]],
    measured: Callable[[Collection[str]], frozenset[str]],
) -> dict[str, set[int]]:
    """The ends whose detaching does to autograd's graph what the numbers say."""
    if measured(ends) == _kept(graph, ends):
        return ends
    fit = (end for end in ends if measured([end]) == _kept(graph, [end]))
    return {end: ends[end] for end in fit}


def _kept(graph: GradientGraph, modules: Collection[str]) -> frozenset[str]:
    return graph.with_gradient({i for path, i in graph.returned if path in modules})


def _choice(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:_SHOWN])
    if not names:
        return "this model has no component that can, leave bypassing off"
    return f"take of {shown}{', ...' if len(names) > _SHOWN else ''}"
