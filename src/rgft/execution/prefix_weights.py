"""The deepest part of a model: its layers, what their output depends on, and whether it changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rgft.structure.architecture import outline
from rgft.structure.layers import Named, join, unwrapped


class Adapters(NamedTuple):
    """Which adapters are on in the prefix.

    Attributes:
        modules: Those of its layers; prompts for attention (peft's `AdaptionPrompt`) are put around
            it when they are switched on, and taken away when off.
        switches: For each layer with adapters of peft, whether they are off, and which are active.
    """

    modules: tuple[int, ...] = ()
    switches: tuple[tuple[bool, str], ...] = ()


class Versions(NamedTuple):
    """What tells whether the prefix computes what it did before.

    Attributes:
        written: Where each tensor is, and how often it was written to.
        adapters: Which adapters are on.
    """

    written: tuple[tuple[int, int], ...] = ()
    adapters: Adapters = Adapters()


def prefix_layers(model: nn.Module) -> list[Named]:
    """The layers that a prefix can consist of, with their names in `model`, the deepest first.

    Of an encoder and a decoder these are the encoder's: every decoder layer reads its last output.
    """
    names = {id(module): name for name, module in model.named_modules()}
    modules = [part.module for part in outline(model) if part.module is not None]
    core = unwrapped(model)
    get_encoder = getattr(core, "get_encoder", None)
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False) and get_encoder:
        inside = {id(module) for module in get_encoder().modules()}
        modules = [module for module in modules if id(module) in inside]
    return [(names[id(module)], module) for module in modules]


def depths(model: nn.Module, layers: Sequence[Named]) -> tuple[int, ...]:
    """The depth of each layer, as in `rgft.Component.depth`."""
    of = {id(part.module): part.depth for part in outline(model)}
    return tuple(of[id(module)] for _, module in layers)


class PrefixWeights:
    """Parameters and buffers that the output of the first layers depends on.

    Args:
        model: The model.
        layers: The layers of the prefix; what stands before and between them belongs to it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Named]) -> None:
        self._layers = layers
        self._slots: list[tuple[str, Mapping[str, Tensor | None], str]] = []
        last = layers[-1][1]
        end = next(part.depth for part in outline(model) if part.module is last)
        owned = {
            id(parameter)
            for part in outline(model)
            if part.depth < end or part.module is last
            for parameter in part.parameters
        }
        inside = {id(module) for _, layer in layers for module in layer.modules()}
        self._adapted = [
            module
            for module in model.modules()
            if hasattr(module, "adapter_layer_names")
            and (id(module) in inside or any(id(p) in owned for p in module.parameters()))
        ]
        for path, module in model.named_modules():
            tensors: Mapping[str, Tensor | None] = module._parameters
            whole = id(module) in inside
            names = [name for name, p in tensors.items() if whole or id(p) in owned]
            self._slots += [(path, tensors, name) for name in names]
            if names or whole:
                self._slots += [(path, module._buffers, name) for name in module._buffers]

    def versions(self) -> Versions:
        """As they are now. What is written through `.data` escapes them, as it escapes autograd."""
        written = tuple((tensor.data_ptr(), tensor._version) for _, tensor in self._tensors())
        return Versions(written, self.adapters())

    def adapters(self) -> Adapters:
        """As in `Versions`."""
        return Adapters(
            tuple(id(module) for _, layer in self._layers for module in layer.modules()),
            tuple((bool(m.disable_adapters), str(m.active_adapter)) for m in self._adapted),
        )

    def trained(self) -> str | None:
        """Name of a parameter that requires a gradient, if there is one."""
        return next((name for name, tensor in self._tensors() if tensor.requires_grad), None)

    def fingerprint(self, data: str) -> str:
        """Hash of structure and values of the prefix, and of what says which data it sees."""
        digest = hashlib.blake2b(data.encode(), digest_size=16)
        for name, layer in self._layers:
            digest.update(f"{name}: {layer!r}".encode())
        for name, tensor in self._tensors():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous()
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path, tensors, name in self._slots:
            if (tensor := tensors.get(name)) is not None:
                yield join(path, name), tensor
