"""Tiny image classifiers and images that they can tell apart, in folders."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rgft.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

SIDE = 32
ROWS = {"train": 64, "validation": 24, "test": 24}
SCHEMA = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
)


def vit(layers: int = 2) -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=SIDE,
            patch_size=8,
        )
    )


def convnext() -> PreTrainedModel:
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=SIDE)
    return ConvNextForImageClassification(config)


def efficientnet_lite() -> PreTrainedModel:
    """At its real size, with random weights: its package has no smaller one."""
    return EfficientNetLiteForImageClassification(EfficientNetLiteConfig())


MODELS = {"vit": vit, "convnext": convnext, "efficientnet-lite": efficientnet_lite}


def build_model(folder: Path, kind: str = "vit") -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[kind]().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def picture(label: int, rng: random.Random) -> Image.Image:
    """Grey noise of 20 x 28 pixels, dark or light on the whole."""
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 140, (28, 20), dtype=np.uint8)
    return Image.fromarray(pixels + np.uint8(100 * label))


def build_data(folder: Path, rows: dict[str, int] | None = None) -> Path:
    """Parquet files as the hub has them."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (rows or ROWS).items():
        labels = [rng.randrange(2) for _ in range(count)]
        columns = {"image": [picture(label, rng) for label in labels], "label": labels}
        datasets.Dataset.from_dict(columns, features=SCHEMA).to_parquet(folder / f"{split}.parquet")
    return folder
