"""Residual-guided fine-tuning and its variants."""

from __future__ import annotations

from rgft.config import Config
from rgft.methods.method import Method, Recipe, Surveyed

GUIDED: dict[str, Method] = {
    "rgft": Method(
        "all components train; learning rate x (1 + alpha E/max E), divided by their mean",
        Config(policy="normalized-max", mean_one=True),
        surveyed=Surveyed(
            shallow=Recipe(4e-4, 16, dropout=False),
            wide=Recipe(1.2e-4, 16, dropout=False),
            deep=Recipe(1e-4, 16, 0.98, dropout=False),
        ),
    ),
    "rgft-rank": Method(
        "all components train; learning rate grows with the rank of E", Config(policy="rank")
    ),
    "rgft-threshold": Method(
        "the top share of components by E trains, the rest is frozen",
        Config(policy="top", every=20, warmup=20),
    ),
    "rgft-lora": Method(
        "LoRA pairs; learning rate of each x (1 + alpha E/max E)",
        Config(granularity="lora", policy="normalized-max"),
        lr=1e-3,
        adapter="lora",
    ),
}
