"""Controls: what a gain by the error map has to be compared with."""

from __future__ import annotations

from rgft.config import Config
from rgft.methods.method import Method

CONTROLS: dict[str, Method] = {
    "full": Method("full fine-tuning", Config(policy="uniform")),
    "linear-probing": Method("only the new head trains", Config(policy="head-only"), lr=1e-3),
    "suffix": Method("the share of components nearest the output trains", Config(policy="suffix")),
    "random": Method(
        "control: as many components as rgft-threshold trains, drawn anew at each decision",
        Config(policy="random", every=20, warmup=20),
    ),
    "inverse": Method(
        "control: learning rate x (1 + alpha (1 - E/max E))", Config(policy="inverse")
    ),
}
