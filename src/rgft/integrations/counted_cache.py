"""A prefix cache whose savings, and whose comparisons, the meter knows of."""

from __future__ import annotations

from torch import nn

from rgft.costs import FlopMeter
from rgft.errors import InputError
from rgft.execution.parallel import many
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage


def counted_cache(model: nn.Module, storage: Storage, meter: FlopMeter | None) -> PrefixCache:
    """The cache; what its comparisons and layers that do not run cost is counted by `meter`.

    Raises:
        InputError: There are several processes, or the model cannot be cached.
    """
    if many():
        raise InputError(
            "prefix_cache works in one process: with several, samples come back to others than "
            "those that have stored them; drop it"
        )
    if meter is None:
        return PrefixCache(model, storage)
    cache = PrefixCache(model, storage, checking=meter.charging)
    meter.skipped = lambda: cache.skipped
    return cache
