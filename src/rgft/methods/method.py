"""What a method is: a few settings on top of the same machinery."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rgft.config import Config
from rgft.execution.galore import Projection

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
        shallow: The last layer alone trains.
        wide: Every layer trains, since the budget pays for it; the labels are known.
        deep: Every layer trains, since the labels are known nowhere.
    """

    shallow: Recipe
    wide: Recipe
    deep: Recipe

    def between(self, frozen: float) -> Recipe:
        """The recipe between `wide` and `shallow` where this share of the layers stays frozen.

        The learning rate is between theirs, in proportion of logarithms.

        >>> recipes = Surveyed(Recipe(4e-4, 16), Recipe(1e-4, 16), Recipe(7e-5, 8))
        >>> round(recipes.between(0.5).lr, 6)
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
        adapter: What is added to the model and trained in place of its own weights; a name in
            `rgft.adapters.ADAPTERS`.
        skip: Share of the well predicted samples that an epoch leaves out; needs a budget.
        percentile_power: Exponent of the percentile of its loss, by which a sample is chosen for a
            backward pass; None for all.
        projection: What Adam sees the gradients of linear layers in; None for as they are.
        surveyed: Where a run with a budget first surveys the model: its recipes after that.
    """

    summary: str
    config: Config
    lr: float = 1e-4
    adapter: str | None = None
    skip: float = 0.0
    percentile_power: float | None = None
    projection: Projection | None = None
    surveyed: Surveyed | None = None
