r"""Bottleneck adapters: a small residual network after the feed-forward part of each layer.

.. math:: h \leftarrow h + U \, \mathrm{ReLU}(D h + b_D) + b_U

with :math:`D` of `width / reduction` rows, initialised near the identity (Houlsby et al. 2019), one
a layer (Pfeiffer et al. 2021). It stands behind the last linear map of the feed-forward part,
before its output is added to the skip connection.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rgft.adapters.folders import ADAPTER, BASE
from rgft.errors import InputError
from rgft.structure.architecture import Part, blocks, outline
from rgft.structure.layers import is_linear

SPREAD = 1e-2  # of the first weights, cut at two of it (Houlsby et al. 2019)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KIND = "bottleneck"  # what the configuration says that it is of


class Bottleneck(nn.Module):
    """A linear map with an adapter behind it.

    Args:
        base_layer: The map.
        reduction: Its output's width over that of the bottleneck.
    """

    def __init__(self, base_layer: nn.Module, reduction: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.reduction = reduction
        weight = self.weight
        width = _sizes(base_layer)[1]
        size = max(1, width // reduction)
        self.down = nn.Linear(width, size, device=weight.device, dtype=weight.dtype)
        self.up = nn.Linear(size, width, device=weight.device, dtype=weight.dtype)
        for part in (self.down, self.up):
            nn.init.trunc_normal_(part.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)
            nn.init.zeros_(part.bias)

    @property
    def weight(self) -> Tensor:
        """That of the map: some models look at its type."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """The map, then the adapter."""
        output: Tensor = self.base_layer(hidden)
        correction: Tensor = self.up(torch.relu(self.down(output)))
        return output + correction


def add_bottlenecks(model: nn.Module, reduction: int) -> nn.Module:
    """An adapter in each layer; these and the new head train, nothing else.

    Raises:
        InputError: A layer has no feed-forward part that ends in a linear map.
    """
    parts = outline(model)
    ends = [_end_of_feed_forward(part) for part in parts if part.module is not None]
    if not ends:
        raise InputError(
            f"bottleneck adapters need layers, and this {type(model).__name__} has none; take "
            "--method full"
        )
    model.requires_grad_(False)
    for owner, name in ends:
        setattr(owner, name, Bottleneck(getattr(owner, name), reduction))
    for parameter in (p for part in parts if part.kind == "head" for p in part.parameters):
        parameter.requires_grad_(True)
    for adapter in _adapters(model).values():
        for part in (adapter.down, adapter.up):
            part.requires_grad_(True)
    return model


def save_apart(model: Any, folder: Path) -> None:
    """The model without its adapters in `base/`, these and the head in `adapter/`.

    They cannot be merged, and a model without them must not be taken for the whole: the folder
    itself has no model that `from_pretrained` would load. `model` loses its adapters for good.
    """
    adapters = _adapters(model)
    (folder / ADAPTER).mkdir(parents=True)
    trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / ADAPTER / WEIGHTS, metadata={"format": "pt"})
    reduction = next(iter(adapters.values())).reduction
    config = {"adapter_type": KIND, "reduction": reduction}
    (folder / ADAPTER / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    for path, adapter in adapters.items():
        model.set_submodule(path, adapter.base_layer)
    model.save_pretrained(folder / BASE)


def load_apart(folder: Path | str) -> nn.Module:
    """The classifier that `save_apart` wrote, with its adapters.

    Raises:
        InputError: The folder holds no such model.
    """
    from transformers import (  # noqa: PLC0415 - slow to import
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    folder = Path(folder)
    written = folder / ADAPTER / CONFIG
    config = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    needed = (folder / BASE / "config.json", folder / ADAPTER / WEIGHTS)
    if config.get("adapter_type") != KIND or not all(path.is_file() for path in needed):
        raise InputError(
            f"{folder} holds no model with bottleneck adapters; give the folder of a run of the "
            "method 'adapters'"
        )
    kind = type(AutoConfig.from_pretrained(folder / BASE))
    images = kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    loader = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    model: nn.Module = loader.from_pretrained(folder / BASE)
    add_bottlenecks(model, int(config["reduction"]))
    weights = load_file(folder / ADAPTER / WEIGHTS)
    missing = {n for n, p in model.named_parameters() if p.requires_grad} ^ weights.keys()
    if missing:
        raise InputError(
            f"the adapters in {folder} are not those of its model ({min(missing)}); train anew"
        )
    model.load_state_dict(weights, strict=False)
    return model


def _adapters(model: nn.Module) -> dict[str, Bottleneck]:
    return {path: m for path, m in model.named_modules() if isinstance(m, Bottleneck)}


def _end_of_feed_forward(layer: Part) -> tuple[nn.Module, str]:
    """The module that holds the last linear map of the feed-forward part, and the map's name."""
    assert layer.module is not None
    own = {
        id(p) for block in blocks(layer) if block.kind == "feed_forward" for p in block.parameters
    }
    maps = [
        (owner, name, child)
        for owner in layer.module.modules()
        for name, child in owner.named_children()
        if is_linear(child) and id(child.weight) in own
    ]
    width = _sizes(maps[0][2])[0] if maps else 0
    back = [(owner, name) for owner, name, child in maps if _sizes(child)[1] == width]
    if not back:
        raise InputError(
            f"bottleneck adapters go behind feed-forward parts, and {layer.name!r} has none that "
            "ends in a linear map; take --method lora"
        )
    return back[-1]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Width of the input and of the output of a linear map."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    # transformers' Conv1D has its weight the other way round
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
