"""Which components must all be frozen for a branch to be bypassed: nothing that trains may starve.

Bypassing a branch takes the gradient from more than the component that it belongs to: the norms in
it may be components of their own, and an encoder feeds the loss through cross-attentions alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from rgft.structure.residual_branches import ResidualBranches

Owners = Mapping[str, Collection[str]]


def openers(branches: ResidualBranches, owners: Owners) -> dict[str, frozenset[str]]:
    """For each component that can be bypassed, those that must be frozen for it, itself included.

    Whatever else is bypassed by this rule, every component that trains has all its gradient.

    Args:
        branches: Those of the model.
        owners: Names of the components that train each parameter.
    """
    names = list(branches.modules)
    found = {name: {name, *_owning(branches.without_gradient([name]), owners)} for name in names}
    for component in dict.fromkeys(c for owning in owners.values() for c in owning):
        while starved := _starved(component, branches, _open_to(component, found), owners):
            candidates = _open_to(component, found)[::-1]  # from the output down
            rests = ((name, [n for n in candidates if n != name]) for name in candidates)
            helping = (
                name
                for name, rest in rests
                if _starved(component, branches, rest, owners) < starved
            )
            found[next(helping, candidates[0])].add(component)
    return {name: frozenset(found[name]) for name in names}


def _open_to(component: str, found: Mapping[str, set[str]]) -> list[str]:
    """What may be bypassed while a component trains."""
    return [name for name, needed in found.items() if component not in needed]


def _starved(
    component: str, branches: ResidualBranches, bypassed: Iterable[str], owners: Owners
) -> frozenset[str]:
    """Parameters of a component that get no gradient under a bypass."""
    lost = branches.without_gradient(bypassed)
    return frozenset(name for name in lost if component in owners.get(name, ()))


def _owning(parameters: Iterable[str], owners: Owners) -> set[str]:
    return {component for name in parameters for component in owners.get(name, ())}
