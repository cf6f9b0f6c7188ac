"""Methods of others that choose what of the model's own weights trains, and how fast."""

from __future__ import annotations

from rgft.config import Config
from rgft.methods.method import Method

PUBLISHED: dict[str, Method] = {
    "auto-rgn": Method(
        "learning rate x RGN/max RGN per parameter tensor (Lee et al. 2023)",
        Config(granularity="parameter", signal="relative", policy="proportional", beta=0.8),
    ),
    "llrd": Method(
        "layer-wise learning-rate decay towards the input", Config(policy="layerwise-decay")
    ),
    "gradual-unfreezing": Method(
        "layers open one by one from the output down", Config(policy="gradual-unfreezing")
    ),
    "bitfit": Method(
        "only biases and the new head train (Ben Zaken et al. 2022)",
        Config(granularity="parameter", policy="biases"),
        lr=1e-3,
    ),
}
