"""Whether a run of `rgft train` keeps what its frozen layers put out, and in which format."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rgft.budgeting import step_share
from rgft.config import Config
from rgft.errors import InputError, warn
from rgft.launch import Launch
from rgft.methods import Method
from rgft.policies import find_policy
from rgft.spec import RunSpec
from rgft.spending import Spending

OFF = "off"


def prefix_cache_format(  # noqa: PLR0913 - what it depends on
    spec: RunSpec,
    method: Method,
    model: nn.Module,
    config: Config,
    *,
    spending: Spending | None,
    batch: Callable[[], dict[str, Tensor]],
    launch: Launch,
) -> str | None:
    """Format of the prefix cache; None for none.

    Args:
        spec: What to run.
        method: Its method.
        model: The model that trains.
        config: Settings of the guide.
        spending: The budget, if there is one.
        batch: Makes a typical batch.
        launch: The processes that run it. There is no cache in several, with a warning, nor
            where no sample can come back.

    Raises:
        InputError: One is asked for, and nothing is ever frozen, batches have to run whole, or
            there are several processes.
    """
    asked = spec.prefix_cache
    if asked == OFF:
        return None
    fixed = config.frozen_below > 1
    why = _never(spec, method, model)
    if not why and asked is not None and not fixed and not find_policy(config).freezes:
        why = f"the method '{spec.method}' freezes no layer (--set frozen_below=N does)"
    if why and asked is not None:
        raise InputError(f"prefix_cache is {asked!r}, but {why}; drop it")
    if why or (asked is None and not (fixed and _pays(spec, model, config, spending, batch))):
        return None
    if launch.size > 1:
        why = "prefix_cache works in one process: with several, samples come back to other ones"
        if asked is not None:
            raise InputError(f"{why}; give --prefix-cache off, or start rgft train in one process")
        warn(f"{why}; the run goes without it")
        return None
    if spending is None and spec.epochs <= 1:
        warn(
            f"prefix_cache is {asked!r} and has no effect: no sample is visited twice; the run "
            "goes without it"
        )
        return None
    return asked or "float32"


def _never(spec: RunSpec, method: Method, model: nn.Module) -> str:
    """Why there can be no cache, whatever is frozen; empty if there can."""
    if method.percentile_power is not None:
        return f"the method '{spec.method}' runs batches whole to choose from them"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return (
            f"'{spec.model}' has an encoder and a decoder, and what goes from one to the other is "
            "not kept"
        )
    return ""


def _pays(
    spec: RunSpec,
    model: nn.Module,
    config: Config,
    spending: Spending | None,
    batch: Callable[[], dict[str, Tensor]],
) -> bool:
    """Whether samples come back, so that there is something to find."""
    if spending is None:
        return False
    share = spending.budget.share
    return not share or share * spec.epochs > step_share(model, config, spending.meter, batch())
