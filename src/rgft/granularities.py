"""How each granularity divides a model: components whose parameters have no names yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import Parameter

from rgft.errors import InputError
from rgft.structure.architecture import Part, blocks, outline
from rgft.structure.attention_heads import Head, split_heads
from rgft.structure.layers import unwrapped, wrapper_prefix
from rgft.structure.projections import Portion, UnsplittableError

Grouping = Callable[[str, Parameter], str]
Granularity = str | Grouping

_LORA = re.compile(r"(?:^|\.)lora_\w+\.(?P<adapter>[^.]+)")


@dataclass(frozen=True, slots=True)
class Draft:
    """A component before its parameters are known by name.

    Attributes:
        name: Unique among the components of a partition.
        kind: What it is.
        depth: Position in the forward pass.
        portions: What it holds; may be nothing.
    """

    name: str
    kind: str
    depth: int
    portions: tuple[Portion, ...]


def drafts(model: nn.Module, granularity: Granularity) -> list[Draft]:
    """The components of a model at a granularity.

    Raises:
        InputError: If the model cannot be split so, or a pattern matches no parameter.
    """
    if not any(True for _ in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameters: give a model that has some.")
    if isinstance(granularity, str):
        split = _SPLITS.get(granularity)
        return split(model) if split else _by_pattern(model, granularity)
    if callable(granularity):
        return _by_function(model, granularity)
    raise InputError(f"granularity {granularity!r} is not {_ALLOWED}: use one of these.")


def _whole(name: str, kind: str, depth: int, parameters: Iterable[Parameter]) -> Draft:
    return Draft(name, kind, depth, tuple(Portion(p) for p in parameters))


# -- by structure ----------------------------------------------------------------------------


def _by_layer(model: nn.Module) -> list[Draft]:
    parts = outline(model)
    return [_whole(part.name, part.kind, part.depth, part.parameters) for part in parts]


def _by_block(model: nn.Module) -> list[Draft]:
    return _within_layers(model, "block")


def _by_head(model: nn.Module) -> list[Draft]:
    return _within_layers(model, "head")


def _within_layers(model: nn.Module, granularity: str) -> list[Draft]:
    try:
        return _divided(model, granularity == "head")
    except UnsplittableError as error:
        finest = _finest(model)
        raise InputError(
            f"granularity {granularity!r} cannot split this {_class(model)}: {error}; the finest "
            f"of layer, block and head for it is {finest!r}: use that."
        ) from error


def _divided(model: nn.Module, by_head: bool) -> list[Draft]:
    """All parts, with the layers divided into blocks and, if asked, the attentions into heads."""
    config = getattr(unwrapped(model), "config", None)
    known: dict[object, Tensor] = {}
    found: list[Draft] = []
    divided = False
    for part in outline(model):
        inside = blocks(part)
        divided |= bool(inside)
        if not inside:
            found.append(_whole(part.name, part.kind, part.depth, part.parameters))
        for block in inside:
            draft = _whole(f"{part.name}.{block.name}", block.kind, part.depth, block.parameters)
            if by_head and block.module is not None:
                heads = split_heads(block.module, config, known)
                found.extend(_headed(draft, heads))
            else:
                found.append(draft)
    if not divided:
        raise UnsplittableError("none of its layers has an attention")
    return found


def _headed(attention: Draft, heads: list[Head]) -> list[Draft]:
    """The heads of an attention, then what is left of it."""
    own = {id(portion.parameter) for portion in attention.portions}
    found = []
    taken: set[int] = set()
    for head in heads:
        # a weight tied to that of a layer below is that layer's
        portions = [p for p in head.portions if id(p.parameter) in own]
        taken.update(id(p.parameter) for p in portions)
        name = f"{attention.name}.{head.name}"
        found.append(Draft(name, head.kind, attention.depth, tuple(portions)))
    rest = [
        portion.parameter for portion in attention.portions if id(portion.parameter) not in taken
    ]
    return [*found, _whole(attention.name, attention.kind, attention.depth, rest)]


def _finest(model: nn.Module) -> str:
    """The finest of layer, block and head that the model can be split at."""
    for name, by_head in (("head", True), ("block", False)):
        try:
            _divided(model, by_head)
        except UnsplittableError:
            continue
        return name
    return "layer"


def _by_lora(model: nn.Module) -> list[Draft]:
    """Each LoRA pair of each adapter, with what else it trains (magnitudes); the rest by layer."""
    names = {id(p): name for name, p in model.named_parameters()}
    prefix = wrapper_prefix(model)
    found: list[Draft] = []
    pairs: dict[str, tuple[int, list[Parameter]]] = {}
    for part in outline(model):
        rest = []
        for parameter in part.parameters:
            name = names[id(parameter)]
            match = _LORA.search(name)
            if match is None:
                rest.append(parameter)
                continue
            path = name[: match.start()].removeprefix(prefix)
            pair = pairs.setdefault(f"{path}.lora.{match['adapter']}", (part.depth, []))
            pair[1].append(parameter)
        found.append(_whole(part.name, part.kind, part.depth, rest))
    if not pairs:
        raise InputError(
            f"granularity 'lora' needs LoRA layers and this {_class(model)} has none; the finest "
            f"of layer, block and head for it is {_finest(model)!r}: use that, or add LoRA first."
        )
    return found + [_whole(name, "lora", depth, held) for name, (depth, held) in pairs.items()]


def _class(model: nn.Module) -> str:
    return type(unwrapped(model)).__name__


# -- by name ---------------------------------------------------------------------------------


def _by_parameter(model: nn.Module) -> list[Draft]:
    parts = _part_of(outline(model))
    return [
        _whole(name, _kind("parameter", [parts[id(p)]]), parts[id(p)].depth, [p])
        for name, p in model.named_parameters()
    ]


def _by_pattern(model: nn.Module, pattern: str) -> list[Draft]:
    """Parameters by the text that the pattern finds in their names."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"granularity {pattern!r} is not {_ALLOWED}: it is no regular expression ({error})."
        ) from error
    found = {name: _found(expression, name) for name, _ in model.named_parameters()}
    if not any(found.values()):
        raise InputError(
            f"granularity {pattern!r} is not {_ALLOWED}: as a regular expression it matches no "
            f"parameter name, such as {next(iter(found))!r}; use one of these."
        )
    grouped = _by_function(model, lambda name, _: found[name] or "rest")
    return [replace(draft, kind="other") if draft.name == "rest" else draft for draft in grouped]


def _found(expression: re.Pattern[str], name: str) -> str:
    """The groups that took part in the match, joined by dots; the match if it has no groups."""
    match = expression.search(name)
    if match is None:
        return ""
    return ".".join(group for group in match.groups() if group) if match.groups() else match[0]


def _by_function(model: nn.Module, group: Grouping) -> list[Draft]:
    """Parameters by what a function of name and parameter says; the lowest depth counts."""
    parts = _part_of(outline(model))
    groups: dict[str, list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        label = group(name, parameter)
        if not isinstance(label, str) or not label:
            raise InputError(
                f"the granularity function returned {label!r} for {name!r}: it must return the "
                "name of a component, a string that is not empty."
            )
        groups.setdefault(label, []).append(parameter)
    found = []
    for label, held in groups.items():
        within = [parts[id(p)] for p in held]
        depth = min(part.depth for part in within)
        found.append(_whole(label, _kind("custom", within), depth, held))
    return found


def _part_of(parts: list[Part]) -> dict[int, Part]:
    return {id(p): part for part in parts for p in part.parameters}


def _kind(kind: str, parts: list[Part]) -> str:
    """`kind`, but "head" for what lies in task heads alone: those are never frozen."""
    return "head" if all(part.kind == "head" for part in parts) else kind


_SPLITS: dict[str, Callable[[nn.Module], list[Draft]]] = {
    "layer": _by_layer,
    "block": _by_block,
    "head": _by_head,
    "lora": _by_lora,
    "parameter": _by_parameter,
}
_ALLOWED = f"one of {', '.join(_SPLITS)}, a pattern of parameter names or a function"
