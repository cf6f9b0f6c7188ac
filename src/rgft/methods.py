"""Every method by name: a few settings on top of the same machinery."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rgft.config import Config
from rgft.errors import unknown

ADAM_BETA2 = 0.999


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where to start from.

    Attributes:
        lr: Learning rate.
        batch_size: Samples per step.
        adam_beta2: Smoothing of squared gradients. In a short run the usual 0.999 remembers steps
            that are no longer like the present ones.
        dropout: Whether the model's dropout acts. A short run learns faster without.
    """

    lr: float
    batch_size: int
    adam_beta2: float = ADAM_BETA2
    dropout: bool = True


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Recipes by what a survey finds (see `rgft.survey`).

    Attributes:
        shallow: The labels are known, and the last layer alone trains.
        wide: The labels are known, and every layer trains, since the budget pays for it.
        deep: The labels are known nowhere.
    """

    shallow: Recipe
    wide: Recipe
    deep: Recipe

    def known(self, frozen: float) -> Recipe:
        """The recipe where the labels are known and this share of the layers stays frozen.

        The learning rate is between those of `wide` and `shallow`, in proportion of logarithms.

        >>> recipes = Surveyed(Recipe(4e-4, 16), Recipe(1e-4, 16), Recipe(7e-5, 8))
        >>> round(recipes.known(0.5).lr, 6)
        0.0002
        """
        rate = self.wide.lr ** (1 - frozen) * self.shallow.lr**frozen
        nearer = self.shallow if frozen >= 0.5 else self.wide
        return replace(nearer, lr=rate)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to fine-tune.

    Attributes:
        summary: One line.
        config: Settings of the guide.
        lr: Learning rate to start a sweep from.
        lora: Whether LoRA pairs are added and trained in place of the model's own weights.
        surveyed: Where a run with a budget first surveys the model: its recipes after that.
    """

    summary: str
    config: Config
    lr: float = 1e-4
    lora: bool = False
    surveyed: Surveyed | None = None


METHODS: dict[str, Method] = {
    "rgft": Method(
        "all components train; learning rate x (1 + alpha E/max E), divided by their mean",
        Config(policy="normalized-max", mean_one=True),
        surveyed=Surveyed(
            shallow=Recipe(4e-4, 16, dropout=False),
            wide=Recipe(1.2e-4, 16, dropout=False),
            deep=Recipe(7e-5, 8, 0.98, dropout=False),
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
        lora=True,
    ),
    "full": Method("full fine-tuning", Config(policy="uniform")),
    "lora": Method(
        "LoRA on all linear layers",
        Config(granularity="lora", policy="uniform"),
        lr=1e-3,
        lora=True,
    ),
    "linear-probing": Method("only the new head trains", Config(policy="head-only"), lr=1e-3),
    "suffix": Method("the share of components nearest the output trains", Config(policy="suffix")),
    "random": Method(
        "control: as many components as rgft-threshold trains, drawn anew at each decision",
        Config(policy="random", every=20, warmup=20),
    ),
    "inverse": Method(
        "control: learning rate x (1 + alpha (1 - E/max E))", Config(policy="inverse")
    ),
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
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: Unknown name.

    >>> find_method("full").config.policy
    'uniform'
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
