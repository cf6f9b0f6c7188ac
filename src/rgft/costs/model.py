"""Costs of training steps of a model, for any batch and any set of trained parameters."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.utils._pytree import tree_flatten

from rgft.costs.graph import Graph, StepCost
from rgft.costs.quantised import stand_ins
from rgft.costs.tracing import trace

KERNELS: Sequence[Callable[[], bool]] = (  # of attention, on whatever device
    cuda.flash_sdp_enabled,
    cuda.mem_efficient_sdp_enabled,
    cuda.cudnn_sdp_enabled,
)
CACHED_GRAPHS, CACHED_STEPS = 256, 4096  # batch shapes; pairs of a shape and a plan


@dataclass(frozen=True, slots=True)
class Action:
    """What is done with a batch.

    Attributes:
        trained: Names of the parameters that require a gradient.
        detached: Paths of modules whose output passes no gradient.
        skipped: Paths of modules that are not run.
    """

    trained: frozenset[str]
    detached: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()


class CostModel:
    """FLOPs of training steps of one model, for any batch and any set of trained parameters.

    Models whose work depends on values (they use operations that the meta device lacks) are traced
    on the host instead, with zeros for weights and the values of the batch.

    Args:
        model: The model; a copy without weights is kept, later changes do not reach it.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> cost = CostModel(model).graph(torch.zeros(3, 4)).cost({"2.weight", "2.bias"})
    >>> (cost.forward, cost.backward) == (2 * 3 * 4 * 8 + 2 * 3 * 8 * 2, 2 * 3 * 8 * 2)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._model = _without_values(model).train()
        self._buffers = {n: b.cpu().clone() for n, b in model.named_buffers()}
        self._graphs: dict[Any, Graph] = {}
        self._steps: dict[Any, StepCost] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(name for name, _ in self._model.named_parameters())

    def step(self, graph: Graph, action: Action) -> StepCost:
        """`Graph.cost` of `action`, remembered."""
        key = (id(graph), action)
        if key not in self._steps:
            if len(self._steps) >= CACHED_STEPS:
                self._steps.clear()
            self._steps[key] = graph.cost(
                action.trained, detached=action.detached, skipped=action.skipped
            )
        return self._steps[key]

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The operations of `model(*args, **kwargs)`: only shapes and types matter."""
        key = _shapes((args, kwargs), self._model.training)
        if key not in self._graphs:
            if len(self._graphs) >= CACHED_GRAPHS:
                self._graphs.clear()
                self._steps.clear()
            try:
                self._graphs[key] = trace(self._model, self._device, args, kwargs)
            except RuntimeError:  # an operation, or a question about the device, that meta has not
                self._leave_meta()
                self._graphs[key] = trace(self._model, self._device, args, kwargs)
        return self._graphs[key]

    def _leave_meta(self) -> None:
        """Zeros on the host for weights; buffers keep their values."""
        self._model = self._model.to_empty(device="cpu")
        for parameter in self._model.parameters():
            parameter.zero_()
        for name, buffer in self._model.named_buffers():
            buffer.copy_(self._buffers[name])


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; the values are never copied."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        # of a DTensor the whole, too
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    memo |= {id(module): dense for module, dense in stand_ins(model)}
    for module in model.modules():  # what hooks hold is not copied
        for name, value in vars(module).items():
            # nor is what FSDP2 keeps in modules under names of its own
            held = name.endswith("_hooks") or name.startswith("__composable_api")
            if held and isinstance(value, dict):
                memo[id(value)] = type(value)()
    with _own_classes(model):
        return copy.deepcopy(model, memo)


@contextmanager
def _own_classes(model: nn.Module) -> Iterator[None]:
    """Modules are of the classes that they had before FSDP2 made them its own, which refuse."""
    before = [(m, type(m)) for m in model.modules() if type(m).__name__.startswith("FSDP")]
    sharding = sys.modules.get("torch.distributed.fsdp")
    own = [(m, c) for m, c in before if sharding and issubclass(c, sharding.FSDPModule)]
    for module, kind in own:
        module.__class__ = kind.__mro__[2]
    try:
        yield
    finally:
        for module, kind in own:
            module.__class__ = kind


def _shapes(tree: Any, training: bool) -> Any:
    leaves, structure = tree_flatten(tree)
    parts = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
    kernels = tuple(enabled() for enabled in KERNELS)
    return parts, str(structure), training, kernels
