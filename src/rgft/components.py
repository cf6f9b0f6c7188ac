"""Components: disjoint sets of parameters (or slices of them) that are adapted as one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rgft.granularities import Draft, Granularity, drafts


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """A parameter, or the part `start:stop` of it along one dimension.

    Attributes:
        parameter: Name as in `model.named_parameters()` (the first name of a shared parameter).
        dim: Dimension that is sliced; None for the whole parameter.
        start: First index along `dim`.
        stop: One past the last index along `dim`.
    """

    parameter: str
    dim: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The view of `tensor` (a parameter, its gradient, its optimizer state) that this names."""
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Component:
    """A disjoint set of parameter elements adapted as one.

    Attributes:
        name: Unique among the components of a partition.
        kind: What it is: "embedding", "layer", "attention", "feed_forward", "attention_head",
            "kv_head", "norm", "lora", "head", "lm_head", "parameter", "custom" or "other".
        depth: Position in the forward pass: embeddings 0, first layer 1, ..., task head last.
        slices: What it holds.
        numel: Number of parameter elements it holds.
    """

    name: str
    kind: str
    depth: int
    slices: tuple[ParameterSlice, ...]
    numel: int


def partition(model: nn.Module, granularity: Granularity) -> list[Component]:
    """Splits the parameters of a model into components, each element in exactly one.

    | granularity | components |
    |---|---|
    | "layer" | layers; embeddings; what stands between or after layers; heads |
    | "block" | as "layer", but each attention, feed-forward and the norms of a layer apart |
    | "head" | as "block", but each head of an attention apart; what is left of it is one more |
    | "lora" | each LoRA pair of each adapter; all else as "layer" |
    | "parameter" | each parameter |
    | a regular expression | by the text (or joined groups) it finds in the name; others "rest" |
    | a function `(name, parameter) -> str` | by what it returns |

    Structure is found, not looked up by model name, so it holds for models never seen before.
    With grouped queries a query head owns its rows of q and columns of the output projection; the
    rows of k and v that a group shares are a component of kind "kv_head".

    Args:
        model: Any module, also wrapped by PEFT, DistributedDataParallel or `torch.compile`.
        granularity: See the table.

    Returns:
        Components by depth; their `numel` add up to the number of parameter elements, tied ones
        counted once.

    Raises:
        InputError: If the model cannot be split so, or the expression matches no parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [(c.name, c.kind, c.depth, c.numel) for c in partition(model, "layer")]
        [('0', 'layer', 1, 9), ('2', 'head', 2, 4)]
    """
    return _components(model, drafts(model, granularity))


def _components(model: nn.Module, drafted: list[Draft]) -> list[Component]:
    """Drafts by depth, with the first name of each parameter; empty ones are dropped."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    components = []
    for draft in sorted(drafted, key=lambda draft: draft.depth):
        slices = tuple(
            ParameterSlice(names[id(p.parameter)], p.dim, p.start, p.stop) for p in draft.portions
        )
        if slices:
            numel = sum(portion.numel for portion in draft.portions)
            components.append(Component(draft.name, draft.kind, draft.depth, slices, numel))
    return components
