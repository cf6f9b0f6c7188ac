"""The frozen deepest layers run once a sample: later forward passes reuse what they put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn

from rgft.errors import InputError, warn
from rgft.execution.cache_use import CacheUse
from rgft.execution.compilation import compiled_whole
from rgft.execution.interception import Call, Interception, undisturbed
from rgft.execution.output_difference import largest_difference
from rgft.execution.prefix_batch import Samples
from rgft.execution.prefix_comparisons import Comparisons
from rgft.execution.prefix_forward import Forward, PrefixLayers, automatic_precision
from rgft.execution.prefix_weights import PrefixWeights, Versions, depths, prefix_layers
from rgft.execution.sample_reader import SampleReader
from rgft.execution.stored_samples import Storage, StoredSamples
from rgft.residuals import SAMPLE_IDS

MODES = ("error", "warn")


class PrefixCache:
    """Spares the forward pass of the frozen deepest layers of a model.

    While the embeddings and the first b layers are frozen (`set_boundary`), what layer b puts out
    is computed once for each sample and stored; from then on the layers do not run for batches of
    stored samples. A batch names its samples by the argument `sample_ids`, which never reaches the
    model. Padding is not stored, so that samples may be batched and padded anew at each visit. The
    prefix always runs in evaluation mode and without gradients, stored or not: dropout is off and
    batch normalisation uses its running statistics there.

    Outputs with and without the cache are compared at the first batch, and again when samples first
    come back in other batches or with other padding. A model for which they differ is refused.

    Args:
        model: The model that trains. It is left as it was by `close`.
        storage: Where activations are kept, and how.
        key: Name of the argument with the ids.
        mode: What a refusal does: "error", or "warn" and go on without the cache.
        checking: Entered around the forward passes of comparisons (to count what they cost).

    Attributes:
        layers: Names of the layers that can be cached.
        paused: While true the model runs as if there were no cache (frozen layers are probed).
        refused: Why the cache is out of use, or None.
        ids: Those that came with the last batch.

    Raises:
        InputError: A setting cannot be used, or the model cannot be cached.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> for parameter in model[:2].parameters():
    ...     _ = parameter.requires_grad_(False)
    >>> with PrefixCache(model) as cache:
    ...     cache.set_boundary(2)
    ...     for _ in range(3):
    ...         _ = model(torch.ones(1, 4), sample_ids=["a"])
    ...     cache.use.misses, cache.use.hits
    (1, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        storage: Storage = Storage(),  # noqa: B008 - a value
        *,
        key: str = SAMPLE_IDS,
        mode: str = "error",
        checking: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
        if compiled_whole(model):
            raise InputError(
                "the model is compiled as a whole, which fixes which layers run; compile its "
                "layers instead (layer.compile()), or train without the prefix cache"
            )
        found = prefix_layers(model)
        self.layers = tuple(name for name, _ in found)
        self.paused = False
        self.refused: str | None = None
        self._model = model
        self._modules = found
        self._depths = depths(model, found)
        self._key, self._mode, self._checking = key, mode, checking
        self._stored = StoredSamples(storage)
        self._prefix = PrefixLayers(model, found)
        self._weights: PrefixWeights | None = None
        self._comparisons = Comparisons(storage.format)
        self._repeats = False  # whether the model calls a layer several times
        self.ids: Any = None
        self._resumed = False
        self._counts = dict.fromkeys(("hits", "extended", "misses", "checks"), 0)
        self._reader = SampleReader(model, key)
        self._interception = Interception(model, self._around)

    def __enter__(self) -> PrefixCache:
        """The cache itself; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def boundary(self) -> int:
        """Number of layers that are cached; 0 at first."""
        return self._prefix.boundary

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the layers that do not run in the present forward pass; empty outside of one."""
        forward = self._prefix.current
        return () if forward is None else self.layers[: forward.start]

    @property
    def counts(self) -> dict[str, int]:
        """The hits, extended, misses and checks of `use`, also after `close`."""
        return dict(self._counts)

    @property
    def use(self) -> CacheUse:
        """What it has done so far."""
        store = self._stored.store
        return CacheUse(
            **self._counts,
            changed=self._stored.changed,
            samples=len(store),
            memory_bytes=store.memory_used,
            disk_bytes=store.disk_used,
            seconds=self._stored.seconds,
        )

    def set_boundary(self, boundary: int) -> None:
        """Cache the first `boundary` layers from the next forward pass on.

        Samples stored at a shallower boundary stay of use: only the layers above it run for them,
        once. Samples stored at a deeper one are dropped.

        Raises:
            InputError: There are not so many layers.
        """
        if not 0 <= boundary <= len(self.layers):
            raise InputError(
                f"boundary is {boundary}; this model has {len(self.layers)} layers that can be "
                f"cached: give 0 to {len(self.layers)}"
            )
        if boundary == self.boundary:
            return
        self._follow_weights()
        self._prefix.intercept(boundary)
        self._stored.drop_above(boundary)
        self._comparisons.forget()
        layers = self._modules[:boundary]
        self._weights = PrefixWeights(self._model, layers) if boundary else None
        self._versions = self._weights.versions() if self._weights else Versions()
        if self._stored.storage.folder is not None and self._weights is not None:
            self._stored.label(self._weights.fingerprint(self._stored.storage.data))

    def follow(self, depth: int) -> None:
        """Cache the layers below `depth`, the least depth of a component that trains."""
        self.set_boundary(sum(d < depth for d in self._depths))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the folder of the storage, which is written out."""
        self._stored.store.flush()
        return {
            "boundary": self.boundary,
            "verified": sorted(self._comparisons.passed),
            "counts": dict(self._counts),
            "stored": self._stored.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, with the entries of then and no later ones.

        The first batch after it teaches the form of the layers' outputs by a forward pass of its
        own, which `checking` does not see: it belongs to the interruption, not to the run.
        """
        self.set_boundary(int(state["boundary"]))
        self._comparisons.passed = set(state["verified"])
        self._counts.update(state["counts"])
        if not self._stored.load_state_dict(state["stored"]):
            warn(
                "the prefix cache has lost samples that it had when the checkpoint was written; "
                "they are computed again, and the run will not end as the uninterrupted one"
            )
        self._resumed = True

    def flush(self) -> None:
        """Let a later run find what is in the folder now; worth while at each checkpoint."""
        self._stored.store.flush()

    def close(self) -> None:
        """Leave the model as it was; a temporary folder is removed.

        Weights that were loaded after the last forward pass (the best of a run) are no matter: what
        is in a given folder is of those before.
        """
        self._weights = None
        self._prefix.intercept(0)
        self._interception.remove()
        self._stored.store.close()

    def _follow_weights(self) -> None:
        """Drop everything if the prefix has changed."""
        if self._weights is None or self._weights.versions() == self._versions:
            return
        # it may consist of other modules now
        self._weights = PrefixWeights(self._model, self._modules[: self.boundary])
        self._versions = self._weights.versions()
        self._comparisons.forget()
        store = self._stored.store
        if len(store):
            warn(
                "weights below the boundary of the prefix cache have changed; the activations of "
                f"{len(store)} samples are dropped and computed again"
            )
            store.clear()
        if self._stored.storage.folder is not None:
            self._stored.label(self._weights.fingerprint(self._stored.storage.data))

    def _around(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward pass of the model."""
        self.ids = ids = kwargs.pop(self._key, None)
        idle = not self.boundary or self.paused or self.refused is not None
        if idle or self._prefix.current is not None or self._of_reference():
            return call(*args, **kwargs)
        self._check_frozen()
        self._follow_weights()
        samples = self._reader.samples(ids, args, kwargs)
        if self._resumed:
            self._resumed = False
            with undisturbed(self._model):
                self._prefix.run(Forward(None), call, args, kwargs)
        forward = self._planned(samples)
        if (
            samples is not None
            and forward.start
            and self._comparisons.untested(samples, self._stored)
        ):
            self._verify(samples, call, args, kwargs)
            if self.refused is not None:
                return call(*args, **kwargs)
        output = self._prefix.run(forward, call, args, kwargs)
        self._conclude(forward)
        if forward.computed is not None and samples is not None and not self._comparisons.passed:
            self._verify(samples, call, args, kwargs)
        return output

    def _of_reference(self) -> bool:
        """Whether other adapters are on than in training: DPO's reference is the model without."""
        assert self._weights is not None
        return not torch.is_grad_enabled() and self._weights.adapters() != self._versions.adapters

    def _check_frozen(self) -> None:
        assert self._weights is not None
        if torch.is_grad_enabled() and (name := self._weights.trained()) is not None:
            raise InputError(
                f"parameter '{name}' is below the boundary of the prefix cache and requires a "
                "gradient; freeze it, lower the boundary, or set paused for this step"
            )

    def _planned(self, samples: Samples | None) -> Forward:
        """What can be spared of a batch."""
        if samples is None:
            return Forward(None)
        depths = self._stored.usable(samples, automatic_precision(self._model))
        mixed = self._repeats and len(set(depths)) > 1
        start = 0 if mixed else min(depths, default=0)
        if start and self._prefix.known(start) and (rows := self._stored.find(samples, depths)):
            return Forward(samples, start, rows)
        return Forward(samples)

    def _conclude(self, forward: Forward) -> None:
        """Count and store what a forward pass has computed."""
        if forward.failed:
            self._refuse(f"the prefix cache cannot serve this model: {forward.failed}")
            return
        self._repeats |= forward.calls > 1
        if forward.samples is None:
            return
        there = forward.rows.get(self.boundary, {})
        kind = "extended" if forward.start else "misses"
        self._counts["hits"] += len(there)
        self._counts[kind] += len(forward.samples.ids) - len(there)
        if forward.computed is not None:
            rows = {i: row for i, row in enumerate(forward.computed) if i not in there}
            self._stored.keep(
                forward.samples, rows, self.boundary, automatic_precision(self._model)
            )

    def _verify(
        self, samples: Samples, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compare the outputs of the model with and without the cache."""
        aspects = self._comparisons.untested(samples, self._stored)
        with self._checking(), undisturbed(self._model):
            cached = self._planned(samples)
            if not cached.start:
                return
            found = self._prefix.run(cached, call, args, kwargs)
            wanted = self._prefix.run(Forward(None), call, args, kwargs)
        self._counts["checks"] += 1
        apart = largest_difference(wanted, found, samples.mask)
        if reason := self._comparisons.judge(aspects, apart, half=cached.half):
            self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self.refused = f"{reason}; train without the cache"
        self._stored.store.clear()
        if self._mode == "error":
            raise InputError(self.refused)
        warn(self.refused)
