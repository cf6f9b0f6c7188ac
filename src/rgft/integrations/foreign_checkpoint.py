"""Going on from a checkpoint that was written without the guide."""

from __future__ import annotations

from rgft.errors import InputError, warn
from rgft.spending import Spending


def begin_anew(spending: Spending | None, step: int) -> None:
    """Say that the map begins anew.

    Args:
        spending: Of the run that goes on.
        step: Optimizer steps that were made without the guide.

    Raises:
        InputError: There is a budget, and no one knows what of it is spent.
    """
    if spending is not None:
        raise InputError(
            f"the checkpoint at step {step} was written without a budget, so that what is spent "
            "of it is not known; resume without a budget, or start anew"
        )
    warn(
        f"the checkpoint at step {step} was written without this callback: weights, optimizer and "
        "schedule go on from it, the error map begins anew"
    )
