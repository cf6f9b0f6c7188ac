"""Methods that add small modules to the model and train these in place of its own weights."""

from __future__ import annotations

from rgft.config import Config
from rgft.methods.method import Method

ADAPTED: dict[str, Method] = {
    "lora": Method(
        "LoRA on all linear layers",
        Config(granularity="lora", policy="uniform"),
        lr=1e-3,
        adapter="lora",
    ),
    "rslora": Method(
        "LoRA scaled by the root of its rank (Kalajdzievski 2023)",
        Config(granularity="lora", policy="uniform"),
        lr=3e-4,
        adapter="rslora",
    ),
    "dora": Method(
        "LoRA on directions, with trained magnitudes (Liu et al. 2024)",
        Config(granularity="lora", policy="uniform"),
        lr=1e-3,
        adapter="dora",
    ),
    "adalora": Method(
        "LoRA whose ranks are pruned by importance while it trains (Zhang et al. 2023)",
        Config(granularity="lora", policy="uniform"),
        lr=2e-3,
        adapter="adalora",
    ),
    "ia3": Method(
        "factors on keys, values and feed-forward activations (Liu et al. 2022)",
        Config(policy="uniform"),
        lr=3e-3,
        adapter="ia3",
    ),
    "adapters": Method(
        "bottleneck adapters behind feed-forward parts (Houlsby et al. 2019; Pfeiffer et al. 2021)",
        Config(policy="uniform"),
        lr=1e-3,
        adapter="bottleneck",
    ),
}
