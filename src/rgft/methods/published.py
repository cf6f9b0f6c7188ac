"""Methods of others that choose what of the model's own weights trains, and how fast."""

from __future__ import annotations

from rgft.config import Config
from rgft.execution.galore import Projection
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
    "lisa": Method(
        "two random layers at a time, embeddings and head always (Pan et al. 2024)",
        Config(policy="lisa", every=20),
    ),
    "badam": Method(
        "one layer at a time, in an order redrawn each cycle, Adam anew (Luo et al. 2024)",
        Config(policy="badam", every=50),
        lr=5e-4,
    ),
    "grass": Method(
        "two layers at a time, drawn by their mean gradient norm (Tian et al. 2026)",
        Config(signal="rms", policy="grass", every=20, warmup=20),
    ),
    "misa": Method(
        "modules with 3% of the parameters, drawn by their gradient norm (Liu et al. 2025)",
        Config(
            granularity=r"^(.+)\.(?:weight|bias)$",
            signal="rms",
            policy="misa",
            parameter_share=0.03,
            every=50,
            warmup=1,
            probe_every=0,
        ),
    ),
    "autofreeze": Method(
        "the lowest layers freeze as their gradients settle (Liu et al. 2021)",
        Config(p=1, policy="autofreeze", every=20, probe_every=0),
    ),
    "greentrainer": Method(
        "tensors of the most loss decrease that a step of 60% can pay for (Huang et al. 2024)",
        Config(
            granularity="parameter",
            signal="improvement",
            policy="purchase",
            beta=0.0,
            every=50,
            warmup=1,
        ),
    ),
    "dropbp": Method(
        "half of the blocks, redrawn each step, are left out of backward (Woo et al. 2024)",
        Config(granularity="block", policy="drop-backward", bypass=True, every=1),
    ),
    "selective-backprop": Method(
        "backward for the hard third of each batch alone (Jiang et al. 2019)",
        Config(policy="uniform"),
        percentile_power=2.0,
    ),
    "infobatch": Method(
        "half of the samples below the mean loss skipped, unbiased (Qin et al. 2024)",
        Config(policy="uniform"),
        skip=0.5,
    ),
    "bitfit": Method(
        "only biases and the new head train (Ben Zaken et al. 2022)",
        Config(granularity="parameter", policy="biases"),
        lr=1e-3,
    ),
    "galore": Method(
        "Adam sees gradients of linear layers in a subspace of rank 8 (Zhao et al. 2024)",
        Config(policy="uniform"),
        lr=5e-4,
        projection=Projection(),
    ),
}
