"""What a training step costs: FLOPs of forward, input gradients and weight gradients.

A model is traced once per batch shape on the meta device: every tensor operation becomes a node of
a graph. The cost of any plan follows from that graph by asking, as autograd does, which values
require a gradient. One multiply-add counts as two FLOPs; element-wise work and the optimizer count
as nothing, the convention of `torch.utils.flop_counter`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

_QKV = ("query", "key", "value")
CACHED_GRAPHS, CACHED_STEPS = 256, 4096  # batch shapes; pairs of a shape and a plan
Operator = Any  # torch._ops.OpOverload, which has no public type


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of the forward pass.

    Attributes:
        inputs: Indices of the values it reads.
        outputs: Indices of the values it makes.
        forward: Its FLOPs.
        gradients: For each input with a gradient of its own, (input, FLOPs of that gradient).
        joint: FLOPs of a backward that computes all input gradients at once (attention).
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    forward: int = 0
    gradients: tuple[tuple[int, int], ...] = ()
    joint: int = 0


@dataclass(frozen=True, slots=True)
class StepCost:
    """FLOPs of one forward and backward pass.

    Attributes:
        forward: Of the forward pass.
        backward: Of input and weight gradients.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations of a forward pass, in order.

    Attributes:
        nodes: The operations that touch floating-point values.
        parameters: Value index of each parameter that is used, by name.
    """

    nodes: tuple[Node, ...]
    parameters: Mapping[str, int]
    _reaches: frozenset[int] = field(default_factory=frozenset)

    def cost(self, trained: Collection[str]) -> StepCost:
        """FLOPs of a step in which just the parameters named in `trained` require a gradient."""
        needs = {self.parameters[name] for name in trained if name in self.parameters}
        forward = backward = 0
        for node in self.nodes:
            forward += node.forward
            if needs.isdisjoint(node.inputs):
                continue
            needs.update(node.outputs)
            if self._reaches.isdisjoint(node.outputs):
                continue
            backward += node.joint + sum(flops for i, flops in node.gradients if i in needs)
        return StepCost(forward, backward)


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
        self._steps: dict[tuple[int, frozenset[str]], StepCost] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(name for name, _ in self._model.named_parameters())

    def step(self, trained: frozenset[str], *args: Any, **kwargs: Any) -> StepCost:
        """FLOPs of one forward and backward of `model(*args, **kwargs)`; see `Graph.cost`."""
        graph = self.graph(*args, **kwargs)
        key = (id(graph), trained)
        if key not in self._steps:
            if len(self._steps) >= CACHED_STEPS:
                self._steps.clear()
            self._steps[key] = graph.cost(trained)
        return self._steps[key]

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The operations of `model(*args, **kwargs)`: only shapes and types matter."""
        key = _shapes((args, kwargs), self._model.training)
        if key not in self._graphs:
            if len(self._graphs) >= CACHED_GRAPHS:
                self._graphs.clear()
                self._steps.clear()
            try:
                self._graphs[key] = _trace(self._model, self._device, args, kwargs)
            except NotImplementedError:
                self._leave_meta()
                self._graphs[key] = _trace(self._model, self._device, args, kwargs)
        return self._graphs[key]

    def _leave_meta(self) -> None:
        """Zeros on the host for weights; buffers keep their values."""
        self._model = self._model.to_empty(device="cpu")
        for parameter in self._model.parameters():
            parameter.zero_()
        for name, buffer in self._model.named_buffers():
            buffer.copy_(self._buffers[name])


class FlopMeter:
    """Adds up the FLOPs of training as it runs, and what full fine-tuning would have cost.

    Every forward pass of `model` in training mode counts, with the backward pass that belongs to
    the parameters requiring a gradient at that moment. The optimizer and evaluation do not count.

    Args:
        model: The model that trains.
        reference: Costs of the model that full fine-tuning would train; by default `model` itself.
            With LoRA: the model before the pairs were added.

    Attributes:
        spent: FLOPs so far.
        full: FLOPs that full fine-tuning would have spent on the same batches.
    """

    def __init__(self, model: nn.Module, reference: CostModel | None = None) -> None:
        self._costs = CostModel(model)
        self._reference = reference or self._costs
        self._model = model
        self.spent = 0
        self.full = 0
        self._probing = False
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    @property
    def share(self) -> float:
        """Spent as a share of full fine-tuning; 0 before the first step."""
        return self.spent / self.full if self.full else 0.0

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Forward passes in this block are spent, but full fine-tuning would not run them."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def close(self) -> None:
        """Stop counting."""
        self._handle.remove()

    def _count(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        trained = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        self.spent += self._costs.step(trained, *args, **kwargs).total
        if not self._probing:
            self.full += self._reference.step(self._reference.names, *args, **kwargs).total


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; the values are never copied."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _shapes(tree: Any, training: bool) -> Any:
    leaves, structure = tree_flatten(tree)
    parts = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
    return parts, str(structure), training


def _trace(model: nn.Module, device: torch.device, args: Any, kwargs: Any) -> Graph:
    where = next(model.parameters()).device
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().to(where), (args, kwargs))
    recorder = _Recorder()
    parameters = {name: recorder.index(p) for name, p in model.named_parameters()}
    with torch.no_grad(), recorder, _FusedAttention(recorder, device):
        output = model(*args, **kwargs)
    outputs = {recorder.index(t) for t in _result(output)}
    return Graph(tuple(recorder.nodes), parameters, frozenset(_reaching(recorder.nodes, outputs)))


def _result(output: Any) -> Iterator[Tensor]:
    """What backward starts from: the loss where the output has one, else every tensor in it."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        yield loss
        return
    yield from (x for x in tree_flatten(output)[0] if isinstance(x, Tensor))


def _reaching(nodes: Sequence[Node], outputs: set[int]) -> set[int]:
    """Values that the outputs depend on."""
    reaching = set(outputs)
    for node in reversed(nodes):
        if not reaching.isdisjoint(node.outputs):
            reaching.update(node.inputs)
    return reaching


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation on floating-point values as a `Node`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self._index: dict[int, int] = {}
        self._alive: list[Tensor] = []  # keeps ids unique
        self.paused = False

    def index(self, tensor: Tensor) -> int:
        if id(tensor) not in self._index:
            self._index[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self._index[id(tensor)]

    def __torch_dispatch__(
        self, func: Operator, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        scalar = func.overloadpacket is torch.ops.aten._local_scalar_dense
        if scalar and args[0].device.type == "meta":
            return False if args[0].dtype == torch.bool else 1  # no value decides what work is done
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is not torch.ops.aten.detach and not self.paused:
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Operator, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if _differentiable(x)]
        made = [x for x in tree_flatten(result)[0] if _differentiable(x)]
        if not tensors or not made:
            return
        inputs, outputs = (tuple(self.index(t) for t in group) for group in (tensors, made))
        packet = func.overloadpacket
        if packet not in flop_registry:
            self.nodes.append(Node(inputs, outputs))
        else:
            forward = flop_registry[packet](*args, **kwargs, out_val=result)
            factors = _factors(packet, args)
            gradients = tuple((self.index(t), forward) for t in factors if _differentiable(t))
            self.nodes.append(Node(inputs, outputs, forward, gradients))


class _FusedAttention(TorchFunctionMode):
    """Notes attention as one operation where the device would run a fused kernel.

    On the meta device attention always falls apart into products; whether it does on a real one
    depends on the kernels there, the types and dropout, which PyTorch itself is asked about.
    """

    def __init__(self, recorder: _Recorder, device: torch.device) -> None:
        super().__init__()
        self._recorder = recorder
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not self._fused(args, kwargs):
            return func(*args, **kwargs)
        self._recorder.paused = True
        result = func(*args, **kwargs)
        self._recorder.paused = False
        given = [*args, *kwargs.values()]
        tensors = [t for t in given if _differentiable(t)]
        query, key, value = ([*args, *(kwargs.get(n) for n in _QKV[len(args) :])])[:3]
        forward, joint = _attention(query.shape, key.shape, value.shape)
        inputs = tuple(self._recorder.index(t) for t in tensors)
        node = Node(inputs, (self._recorder.index(result),), forward, joint=joint)
        self._recorder.nodes.append(node)
        return result

    def _fused(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the device has a fused kernel for this call."""

        def real(tensor: Tensor) -> Tensor:
            size, stride = tensor.size(), tensor.stride()
            return torch.empty_strided(size, stride, dtype=tensor.dtype, device=self._device)

        if self._device.type == "meta":
            return False
        self._recorder.paused = True
        args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
        choice = torch._fused_sdp_choice(*args, **kwargs)
        self._recorder.paused = False
        return int(choice) != SDPBackend.MATH.value


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _factors(packet: Operator, args: Any) -> Sequence[Any]:
    """The two operands of a product: the gradient of each costs as much as the product."""
    added = packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
    operands: Sequence[Any] = args[1:3] if added else args[:2]
    return operands


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[int, int]:
    """FLOPs of fused attention: two products forward, five backward (one is a recomputation)."""
    *batch, length, width = query
    count = 1
    for size in batch:
        count *= size
    scores = 2 * count * length * key[-2] * width
    mixed = 2 * count * length * key[-2] * value[-1]
    return scores + mixed, 3 * scores + 2 * mixed
