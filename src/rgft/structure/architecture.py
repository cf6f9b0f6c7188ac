"""The outline of a model: embeddings, layers, what stands between and after them, heads.

Position in the forward pass is read from the order of registration; a word in a name ("embed",
"final", "cross") decides only where structure cannot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn
from torch.nn import Parameter

from rgft.structure.layers import (
    Named,
    attentions,
    embeds,
    find_layers,
    is_norm,
    join,
    matrices,
    plain,
    unwrapped,
)

Parameters = tuple[Parameter, ...]

_CROSS = re.compile(r"cross|encoder_?att|enc_?dec", re.IGNORECASE)
_FINAL = re.compile(r"final", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model at granularity "layer".

    Attributes:
        name: Component name, from the module path without the prefixes of wrappers.
        kind: "embedding", "layer", "norm", "other", "head" or "lm_head".
        depth: Position in the forward pass.
        parameters: What it holds; each parameter of the model is in one part only.
        module: The layer itself; None for the other kinds.
    """

    name: str
    kind: str
    depth: int
    parameters: Parameters
    module: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a layer at granularity "block".

    Attributes:
        name: "attention", "cross_attention", "feed_forward" or "norm" (or the attention's path).
        kind: "attention", "feed_forward" or "norm".
        parameters: What it holds.
        module: The attention module; None for the other kinds.
    """

    name: str
    kind: str
    parameters: Parameters
    module: nn.Module | None = None


def outline(model: nn.Module) -> list[Part]:
    """The parts of a model in order of depth; together they hold each parameter once.

    Depth is 0 for what feeds the first layer, i + 1 for layer i (counted through all stacks, so
    that decoder layers come after the encoder's), that of the layer before it for what stands
    between two layers; then come final norm and pooler, then task head and output embedding. A
    parameter used at several depths belongs to the lowest.

    Args:
        model: Any module; wrappers such as PEFT's or DistributedDataParallel are looked through.
    """
    core = unwrapped(model)
    base = _base_path(core)
    layers = find_layers(core.get_submodule(base or ""), base or "")
    segments = list(_segments(core, "", {id(layer): path for path, layer in layers}))
    parts = _classified(segments, _heads(core, base, segments), base)
    return _disjoint([*parts, *_added(model, parts)])


def blocks(layer: Part) -> list[Block]:
    """The attentions, feed-forward and norms of a layer; empty if it has no attention.

    All norms of the layer, also those inside its attention, are one block. What is neither norm
    nor attention is feed-forward.
    """
    if layer.module is None or not (found := list(attentions(layer.module))):
        return []
    free = {id(p): p for p in layer.parameters}
    norms = _take(free, (m for m in layer.module.modules() if is_norm(m)))
    split = [
        Block(name, "attention", _take(free, [module]), module)
        for name, module in _attention_names(found)
    ]
    split.append(Block("feed_forward", "feed_forward", tuple(free.values())))
    split.append(Block("norm", "norm", norms))
    return [block for block in split if block.parameters]


@dataclass(frozen=True, slots=True)
class _Segment:
    """A layer, or a largest module (or bare parameter) that holds none."""

    path: str
    parameters: Parameters
    module: nn.Module | None
    is_layer: bool

    @property
    def is_norm(self) -> bool:
        return self.module is not None and is_norm(self.module)

    @property
    def is_embedding(self) -> bool:
        named = _EMBEDDING.search(self.path.rpartition(".")[2]) is not None
        return not self.is_layer and (named or (self.module is not None and embeds(self.module)))


def _base_path(core: nn.Module) -> str | None:
    """Path of the headless model inside; "" if it is all base; None if the model does not say."""
    prefix = getattr(core, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return None
    return prefix if prefix and isinstance(getattr(core, prefix, None), nn.Module) else ""


def _segments(module: nn.Module, path: str, layers: dict[int, str]) -> Iterator[_Segment]:
    """Layers and the largest pieces between them, in order of registration."""
    for name, parameter in module.named_parameters(recurse=False):
        yield _Segment(join(path, name), (parameter,), None, False)
    for name, child in module.named_children():
        child_path = join(path, name)
        parameters = tuple(child.parameters())
        if id(child) in layers:
            if layers[id(child)] == child_path:
                yield _Segment(child_path, parameters, child, True)
        elif any(id(m) in layers for m in child.modules()):
            yield from _segments(child, child_path, layers)
        elif parameters:
            yield _Segment(child_path, parameters, child, False)


def _classified(segments: list[_Segment], heads: dict[str, str], base: str | None) -> list[Part]:
    """Units with name, kind and depth; all embeddings and stems together are one part."""
    layers = [
        i for i, segment in enumerate(segments) if segment.is_layer and segment.path not in heads
    ]
    paths = {segment.path for segment in segments}
    parts: list[Part] = []
    stem: list[_Segment] = []
    depth = 0
    for i, segment in enumerate(segments):
        if i in layers:
            depth += 1
            parts.append(Part(segment.path, "layer", depth, segment.parameters, segment.module))
        elif segment.path in heads:
            continue
        elif layers and _is_stem(segments, i, layers[0]):
            stem.append(segment)
        else:
            between = bool(layers) and layers[0] < i < layers[-1]
            name, kind = _short(segment.path, base, paths), "norm" if segment.is_norm else "other"
            place = depth if between else len(layers) + 1
            parts.append(Part(name, kind, place, segment.parameters))
    last = max((part.depth for part in parts), default=0) + 1
    task = [Part(u.path, heads[u.path], last, u.parameters) for u in segments if u.path in heads]
    return [*_stem_part(stem), *parts, *task]


def _stem_part(stem: list[_Segment]) -> list[Part]:
    if not stem:
        return []
    name = "embeddings" if any(segment.is_embedding for segment in stem) else "stem"
    return [Part(name, "embedding", 0, tuple(p for segment in stem for p in segment.parameters))]


def _is_stem(segments: list[_Segment], i: int, first_layer: int) -> bool:
    """Whether a segment works on the input: it comes before the layers, or it embeds."""
    segment = segments[i]
    if segment.is_embedding or i < first_layer:
        return segment.is_embedding or not _FINAL.search(segment.path)
    # DeBERTa's relative embeddings are followed by a norm of their own
    return segment.is_norm and segments[i - 1].is_embedding


def _heads(core: nn.Module, base: str | None, segments: list[_Segment]) -> dict[str, str]:
    """Paths of the segments that are heads, with their kind."""
    if base is None:
        return {segments[-1].path: "head"} if _ends_in_head(segments) else {}
    heads = {u.path: "head" for u in segments if base and not f"{u.path}.".startswith(f"{base}.")}
    getter = getattr(core, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    for segment in segments:
        inside = [] if segment.module is None or segment.is_layer else segment.module.modules()
        if output is not None and any(module is output for module in inside):
            heads[segment.path] = "lm_head"
    return heads


def _ends_in_head(segments: list[_Segment]) -> bool:
    """Whether the last child of a plain model is, or ends in, a linear map."""
    if len(segments) < 2 or (last := segments[-1]).module is None or "." in last.path:
        return False
    linear = isinstance(plain(last.module), nn.Linear)
    weighted = [m for m in last.module.modules() if matrices(m)]
    ends = bool(weighted) and isinstance(plain(weighted[-1]), nn.Linear)
    return linear or (ends and not last.is_layer)


def _added(model: nn.Module, parts: list[Part]) -> list[Part]:
    """What a wrapper adds outside the model, such as a soft prompt."""
    held = {id(p) for part in parts for p in part.parameters}
    groups: dict[str, list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            groups.setdefault(name.split(".")[0], []).append(parameter)
    return [Part(name, "other", 0, tuple(own)) for name, own in groups.items()]


def _disjoint(parts: list[Part]) -> list[Part]:
    """The parts by depth, each parameter kept only where it comes first."""
    kept = []
    seen: set[int] = set()
    for part in sorted(parts, key=lambda part: part.depth):
        own = {id(p): p for p in part.parameters if id(p) not in seen}
        seen.update(own)
        if own:
            kept.append(replace(part, parameters=tuple(own.values())))
    return kept


def _attention_names(found: list[Named]) -> list[Named]:
    """Attentions as "attention" and "cross_attention" where each is alone; else by their paths."""
    labels = [
        "cross_attention" if _CROSS.search(f"{path} {type(module).__name__}") else "attention"
        for path, module in found
    ]
    counts = Counter(labels)
    return [
        (label if counts[label] == 1 else path, module)
        for label, (path, module) in zip(labels, found, strict=True)
    ]


def _take(free: dict[int, Parameter], modules: Iterable[nn.Module]) -> Parameters:
    """Removes the parameters of some modules from `free` and returns them."""
    taken = dict.fromkeys(id(p) for module in modules for p in module.parameters())
    return tuple(free.pop(key) for key in taken if key in free)


def _short(path: str, base: str | None, paths: set[str]) -> str:
    """A direct child of the base model goes by its own name: "pooler", "norm", "ln_f"."""
    short = path.removeprefix(f"{base}.") if base else path
    return path if "." in short or short in paths else short
