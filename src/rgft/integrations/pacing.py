"""A scheduler that follows a budget in place of the steps."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from rgft.errors import InputError
from rgft.spending import Spending


def pace(scheduler: Any, spending: Spending, steps: int) -> LambdaLR:
    """Let the learning rate follow the budget in place of the steps; the scheduler that does.

    Raises:
        InputError: The scheduler is not a function of the step.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, LambdaLR):
        raise InputError(
            f"the scheduler is a {type(inner).__name__}, which a budget cannot pace; use one that "
            "is a function of the step (linear, cosine, constant: a LambdaLR)"
        )
    inner.lr_lambdas = [spending.paced(f, steps) for f in inner.lr_lambdas]
    return inner


def set_rates(scheduler: LambdaLR) -> None:
    """Ask the schedule again, between two of its steps."""
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * scale(scheduler.last_epoch) for base, scale in rates]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
