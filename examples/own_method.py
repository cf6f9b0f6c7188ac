"""A method of your own: components above the mean of the error map train, the others wait.

rgft train --task reviews --extend examples/own_method.py --method above-mean --output-dir DIR
rgft bench SUITE.yaml --extend examples/own_method.py --output-dir DIR
"""

from __future__ import annotations

import torch

import rgft


def above_mean(situation: rgft.Situation) -> torch.Tensor:
    """One multiplier a component; 0 freezes."""
    scale = (situation.error >= situation.error.mean()).double()
    scale[situation.always] = 1.0  # new heads
    return scale


METHODS = {
    "above-mean": rgft.Method(
        "components above the mean of the error map train",
        rgft.Config(policy=rgft.Policy(above_mean), every=4, warmup=4),
    )
}
