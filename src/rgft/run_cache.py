"""Whether a run of `rgft train` keeps what its frozen layers put out, and in which format."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor, nn

from rgft.budgeting import step_share
from rgft.config import Config
from rgft.errors import InputError
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
        launch: The processes that run it. There is no cache in several, with a warning.

    Raises:
        InputError: One is asked for, and nothing is ever frozen, batches have to run whole, or
            there are several processes.
    """
    found = _format(spec, method, model, config, spending, batch)
    if found is None or launch.size == 1:
        return found
    why = "prefix_cache works in one process: with several, samples come back to other ones"
    if spec.prefix_cache is not None:
        raise InputError(f"{why}; give --prefix-cache off, or start rgft train in one process")
    warnings.warn(f"{why}; the run goes without it", RuntimeWarning, stacklevel=2)
    return None


def _format(  # noqa: PLR0913, PLR0917 - what it depends on
    spec: RunSpec,
    method: Method,
    model: nn.Module,
    config: Config,
    spending: Spending | None,
    batch: Callable[[], dict[str, Tensor]],
) -> str | None:
    """The format in one process."""
    if spec.prefix_cache == OFF:
        return None
    why, config_of = "", getattr(model, "config", None)
    if method.percentile_power is not None:
        why = f"the method '{spec.method}' runs batches whole to choose from them"
    elif getattr(config_of, "is_encoder_decoder", False):
        why = f"'{spec.model}' has an encoder and a decoder, and what goes from one to the other is"
        why += " not kept"
    if why and spec.prefix_cache is not None:
        raise InputError(f"prefix_cache is {spec.prefix_cache!r}, but {why}; drop it")
    if why:
        return None
    fixed = config.frozen_below > 1
    if spec.prefix_cache is not None:
        if not fixed and not find_policy(config).freezes:
            raise InputError(
                f"prefix_cache is {spec.prefix_cache!r}, but the method '{spec.method}' freezes no "
                "layer: drop it, or freeze some with --set frozen_below=N"
            )
        return spec.prefix_cache
    if not fixed or spending is None:
        return None
    share = spending.budget.share
    # without a second visit there is nothing to find
    if share and share * spec.epochs <= step_share(model, config, spending.meter, batch()):
        return None
    return "float32"
