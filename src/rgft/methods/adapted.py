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
}
