"""What a plan freezes is bypassed: the gradient takes its skip connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rgft.components import Component
from rgft.costs import FlopMeter
from rgft.errors import InputError
from rgft.execution.binding import Binding
from rgft.execution.bypass import Detachment
from rgft.plan import Plan
from rgft.structure.layers import wrapper_prefix
from rgft.structure.openers import openers
from rgft.structure.residual_branches import ResidualBranches, residual_branches


class PlanBypass:
    """Bypasses each component that a plan freezes, as far as it can be.

    The residual branches are found on the first batch that the model trains on, by forward passes
    of a copy, which the meter counts. What trains keeps all its gradient: a component stays open
    while something else trains that depends on it (see `rgft.structure.openers`).

    Args:
        model: The model that trains, wrapped or not.
        components: Its partition.
        binding: What of it can be adapted.
        meter: Counts FLOPs; told what is detached, and charged for the search.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Sequence[Component],
        binding: Binding,
        meter: FlopMeter | None,
    ) -> None:
        self._components = components
        self._binding = binding
        self._meter = meter
        self._detachment = Detachment(model)
        self._modules: dict[str, list[str]] | None = None
        self._openers: dict[str, list[str]] = {}
        self._plan: Plan | None = None
        self.components: tuple[str, ...] = ()
        self.acted = False

        # a function, so that a copy of the model does not copy all this
        def search(module: nn.Module, args: Any, kwargs: Any) -> None:
            learning = model.training and torch.is_grad_enabled()
            if module is model and learning and self._modules is None:
                self._search(model, args, kwargs)

        # before a meter counts the same pass
        self._handle = model.register_forward_pre_hook(search, with_kwargs=True, prepend=True)

    @property
    def gates(self) -> dict[str, list[int]]:
        """For modules that may be detached, by their paths for the meter, who opens them (bits)."""
        index = {component.name: i for i, component in enumerate(self._binding.components)}
        found: dict[str, list[int]] = {}
        for name, paths in (self._modules or {}).items():
            bits = sum(1 << index[opener] for opener in self._openers[name])
            for path in self._for_meter(paths):
                found.setdefault(path, []).append(bits)
        return found

    def follow(self, plan: Plan, *, lifted: bool = False) -> None:
        """Bypass what `plan` freezes from the next forward pass on.

        Args:
            plan: The plan in force.
            lifted: Whether nothing is bypassed for now, because frozen components are scored.
        """
        self._plan = None if lifted else plan
        trained: set[str] = set()
        if not lifted:
            trained = {c.name for c, on in zip(plan.components, plan.trained, strict=True) if on}
        possible = () if lifted else self._modules or ()
        self.components = tuple(n for n in possible if trained.isdisjoint(self._openers[n]))
        depth = {component.name: component.depth for component in plan.components}
        self.acted |= any(depth[name] >= plan.boundary for name in self.components)
        paths = [path for name in self.components for path in (self._modules or {})[name]]
        paths = list(dict.fromkeys(paths))
        if tuple(paths) != self._detachment.modules:
            self._detachment.set(paths)
        if self._meter is not None:
            self._meter.detached = frozenset(self._for_meter(paths))

    def close(self) -> None:
        """Bypass nothing any more."""
        self._handle.remove()
        self._detachment.close()
        self.components = ()
        if self._meter is not None:
            self._meter.detached = frozenset()

    def state_dict(self) -> dict[str, Any]:
        """What was found, so that a resumed run need not search on another batch."""
        return {"modules": self._modules, "openers": self._openers, "acted": self.acted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._modules, self._openers = state["modules"], state["openers"]
        self.acted = bool(state["acted"])

    def _search(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Find the branches, and bypass what the plan in force freezes."""

        def forward(twin: nn.Module) -> Any:
            if self._meter is not None:
                self._meter.charge(*args, **kwargs)
            return twin(*args, **kwargs)

        branches = residual_branches(model, self._components, forward)
        adapted = {component.name for component in self._binding.components}
        modules = {name: list(m) for name, m in branches.modules.items() if name in adapted}
        if not modules:
            raise InputError(_nothing(branches))
        owners: dict[str, list[str]] = {}
        for component in self._binding.components:
            for part in component.slices:
                owners.setdefault(part.parameter, []).append(component.name)
        needed = openers(branches, owners)
        self._openers = {name: sorted(needed[name] & adapted) for name in modules}
        self._modules = modules
        self._handle.remove()
        if self._plan is not None:
            self.follow(self._plan)

    def _for_meter(self, paths: Sequence[str]) -> list[str]:
        """Paths of modules in the model that the meter knows."""
        prefix = "" if self._meter is None else wrapper_prefix(self._meter.model)
        return [prefix + path for path in paths]


def _nothing(branches: ResidualBranches) -> str:
    name, why = next(iter(branches.missing.items()), ("", ""))
    reason = f" ({name!r}: {why})" if name else ""
    return (
        f"bypass=True, but no component of this model can be bypassed{reason}; set bypass=False, "
        "or take granularity 'layer' and a residual network"
    )
