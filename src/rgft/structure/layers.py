"""Which modules of a model are its layers, attentions and norms, found by structure.

The rules look at how modules are nested and repeated, at their base classes and weight shapes; a
word in a class name ("norm", "attention") decides only where structure cannot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

Named = tuple[str, nn.Module]

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without PEFT, data-parallel and compile wrappers around it."""
    while True:
        inner = _inner(model)
        if inner is None or inner is model:
            return model
        model = inner


def without_replicas(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel wraps, or the model itself."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def wrapper_prefix(model: nn.Module) -> str:
    """What wrappers put before the names of the model's own parameters and modules."""
    core = unwrapped(model)
    path = next(name for name, module in model.named_modules() if module is core)
    return f"{path}." if path else ""


def plain(module: nn.Module) -> nn.Module:
    """The module that a PEFT tuner layer wraps, or the module itself."""
    for name in ("base_layer", "original_module"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return plain(inner)
    return module


def find_layers(root: nn.Module, path: str) -> list[Named]:
    """The layers of a model in order, each module once.

    They are the repeated blocks of several weights, failing that single repeated weights (an
    MLP), failing that the top-level children.

    Args:
        root: The model without its heads.
        path: Where `root` is; layers are named from there.
    """
    for minimum in (2, 1):
        found: dict[int, Named] = {}
        for layer_path, layer in _search(root, path, minimum):
            found.setdefault(id(layer), (layer_path, layer))
        if found:
            return list(found.values())
    return _top_level(root, path)


def attentions(module: nn.Module, path: str = "") -> Iterator[Named]:
    """The outermost attention modules under `module`."""
    for name, child in module.named_children():
        if _is_attention(name, child):
            yield join(path, name), child
        else:
            yield from attentions(child, join(path, name))


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map, transformers' own included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation: named so, and without any matrix."""
    parameters = list(module.parameters())
    named = "norm" in type(plain(module)).__name__.lower()
    return named and bool(parameters) and all(p.ndim <= 1 for p in parameters)


def embeds(module: nn.Module) -> bool:
    """Whether a module looks anything up in a table."""
    return any(isinstance(m, nn.Embedding) for m in module.modules())


def matrices(module: nn.Module) -> int:
    """Number of weights with at least two dimensions, adapters left out."""
    return sum(p.ndim >= 2 and "lora_" not in name for name, p in module.named_parameters())


def join(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}.{name}" if path else name


def _inner(model: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, or None if the model is no wrapper."""
    get_base = getattr(model, "get_base_model", None)
    if hasattr(model, "peft_config") and callable(get_base):
        inner = get_base()
        return inner if isinstance(inner, nn.Module) else None
    children = dict(model.named_children())
    if len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
        return children.get("module", children.get("_orig_mod"))
    return None


def _search(module: nn.Module, path: str, minimum: int) -> Iterator[Named]:
    """Blocks under `module`: repeated children of containers, not the stages that hold blocks."""
    repeated = _repeated(module, minimum)
    for name, child in module.named_children():
        marked = _checkpoints(child) and matrices(child) >= 2
        if (marked or id(child) in repeated) and not _is_stage(child, minimum):
            yield join(path, name), child
        else:
            yield from _search(child, join(path, name), minimum)


def _repeated(container: nn.Module, minimum: int) -> set[int]:
    """Ids of the children of a ModuleList or Sequential that are blocks of a repeated class."""
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return set()
    children = list(container.children())
    fit = [c for c in children if not _is_container(c) and matrices(c) >= minimum]
    counts = Counter(type(plain(child)) for child in fit)
    alone = len(counts) == 1 and len(fit) == len(children)
    return {id(c) for c in fit if alone or counts[type(plain(c))] > 1 or _checkpoints(c)}


def _is_stage(module: nn.Module, minimum: int) -> bool:
    """Whether a block is only a frame around blocks of its own (a stage of Swin or ConvNeXt)."""
    nested = [layer for _, layer in _search(module, "", minimum)]
    if any(True for layer in nested for _ in attentions(layer)):
        return True  # layers hold attentions, not layers
    for name, child in module.named_children():
        repeated = _repeated(child, minimum)
        inner = [c for c in child.children() if id(c) in repeated]
        if not inner or (_checkpoints(module) and not all(map(_checkpoints, inner))):
            continue
        if all(path.split(".")[0] == name for path, _ in attentions(module)):
            return True
    return False


def _top_level(root: nn.Module, path: str) -> list[Named]:
    """Children with weights, for a model in which nothing repeats."""
    children = [(n, c) for n, c in root.named_children() if any(True for _ in c.parameters())]
    if len(children) == 1 and not any(True for _ in root.parameters(recurse=False)):
        return _top_level(children[0][1], join(path, children[0][0]))
    return [(join(path, n), c) for n, c in children if matrices(c) and not embeds(c)]


def _checkpoints(module: nn.Module) -> bool:
    """Whether it is a transformers layer: their common base class marks what is checkpointed."""
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _is_container(module: nn.Module) -> bool:
    return isinstance(plain(module), nn.ModuleList | nn.Sequential | nn.ModuleDict)


def _is_attention(name: str, module: nn.Module) -> bool:
    named = _ATTENTION.search(type(plain(module)).__name__) or _ATTENTION.search(name)
    return bool(named) and not _is_container(module) and matrices(module) >= 2
