"""The operations of a forward pass, and what a training step costs by them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of the forward pass.

    Attributes:
        inputs: Indices of the values it reads.
        outputs: Indices of the values it makes.
        forward: Its FLOPs.
        gradients: For each input with a gradient of its own, (input, FLOPs of that gradient).
        joint: FLOPs of a backward that computes all input gradients at once (attention).
        corrections: (inputs, FLOPs) that come to it where all of these have a gradient.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    forward: int = 0
    gradients: tuple[tuple[int, int], ...] = ()
    joint: int = 0
    corrections: tuple[tuple[frozenset[int], int], ...] = ()


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
class Span:
    """What a module did in the forward pass.

    Attributes:
        nodes: Positions of the operations that ran inside it.
        outputs: Indices of the values it returned.
    """

    nodes: frozenset[int]
    outputs: frozenset[int]


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations of a forward pass, in order.

    Attributes:
        nodes: The operations that touch floating-point values.
        parameters: Value index of each parameter that is used, by name.
        outputs: Values that backward starts from.
        modules: What each module did, by path.
    """

    nodes: tuple[Node, ...]
    parameters: Mapping[str, int]
    outputs: frozenset[int]
    modules: Mapping[str, Span] = field(default_factory=dict)
    _reaching: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_reaching", _reaching(self.nodes, self.outputs, frozenset()))

    def cost(
        self,
        trained: Collection[str],
        *,
        detached: Collection[str] = (),
        skipped: Collection[str] = (),
    ) -> StepCost:
        """FLOPs of a step in which just the parameters named in `trained` require a gradient.

        Args:
            trained: Names of parameters; unknown ones are ignored.
            detached: Paths of modules through whose output no gradient flows (bypassed branches).
            skipped: Paths of modules that are not run, because what they return is known (a
                cached prefix).
        """
        unrun = self.within(skipped)
        ran = (node for i, node in enumerate(self.nodes) if i not in unrun)
        forward = sum(node.forward for node in ran)
        wanted = {self.parameters[name] for name in trained if name in self.parameters}
        backward = sum(self._gradients(wanted, detached, skipped))
        return StepCost(forward, backward)

    def within(self, paths: Iterable[str]) -> frozenset[int]:
        """Positions of the operations that run in the modules with these paths."""
        return frozenset(chain.from_iterable(self.modules[path].nodes for path in paths))

    def _gradients(
        self, wanted: set[int], detached: Collection[str], skipped: Collection[str]
    ) -> Iterator[int]:
        """FLOPs of each gradient that is computed, as autograd decides it.

        `wanted` are the values that require a gradient; it grows.
        """
        cut = self._made_by(detached)
        unrun = self.within(skipped)
        reaching = _reaching(self.nodes, self.outputs, cut) if cut else self._reaching
        for i, node in enumerate(self.nodes):
            if i in unrun or wanted.isdisjoint(node.inputs):
                continue
            live = [value for value in node.outputs if value not in cut]
            wanted.update(live)
            if reaching.isdisjoint(live):
                continue
            yield node.joint
            yield from (flops for value, flops in node.gradients if value in wanted)
            yield from (flops for values, flops in node.corrections if values <= wanted)

    def _made_by(self, paths: Iterable[str]) -> frozenset[int]:
        return frozenset(chain.from_iterable(self.modules[path].outputs for path in paths))


def _reaching(
    nodes: Sequence[Node], outputs: Iterable[int], cut: Collection[int]
) -> frozenset[int]:
    """Values from which a path of gradients leads to the outputs."""
    reaching = set(outputs) - set(cut)
    for node in reversed(nodes):
        if not reaching.isdisjoint(node.outputs):
            reaching.update(value for value in node.inputs if value not in cut)
    return frozenset(reaching)
