"""The guide of a loop that others run, with what was asked for beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgft.config import Config
from rgft.costs import FlopMeter
from rgft.errors import warn
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from rgft.guide import Guide
from rgft.integrations.counted_cache import counted_cache
from rgft.integrations.foreign_checkpoint import begin_anew
from rgft.integrations.loss_watch import LossWatch
from rgft.residuals import Ledger
from rgft.scoring import Probe
from rgft.spending import Spending


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a callback was asked for.

    Attributes:
        probe: See `Guide`.
        storage: Of the prefix cache; None for no cache.
        residuals: Where the residual ledger is written; None for no ledger.
        meter: Counts FLOPs; None for that of the budget.
    """

    probe: Probe | None = None
    storage: Storage | None = None
    residuals: str | Path | None = None
    meter: FlopMeter | None = None


class Guidance:
    """The guide of one training, with its budget, prefix cache and residual ledger.

    Args:
        model: That trains.
        optimizer: Over its parameters.
        config: What to do.
        wishes: What else was asked for.
        spending: What is spent of a budget.
        dataset: The training data, where a residual ledger is kept.

    Raises:
        InputError: Something asked for cannot be had. The model is left as it was.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what it holds together
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        wishes: Wishes,
        spending: Spending | None,
        dataset: Any = None,
    ) -> None:
        self.spending = spending
        self.cache: PrefixCache | None = None
        self.watch: LossWatch | None = None
        self._probe = wishes.probe
        meter = wishes.meter or (None if spending is None else spending.meter)
        probe = None if self._probe is None else self._probed
        with ExitStack() as held:
            if wishes.storage is not None:
                self.cache = held.enter_context(counted_cache(model, wishes.storage, meter))
            self.guide = Guide(
                model, optimizer, config, probe=probe, spending=spending, meter=meter
            )
            held.callback(self.guide.close)
            if wishes.residuals is not None:
                self.watch = LossWatch(model, dataset, wishes.residuals, self.cache)
                held.callback(self.watch.close)
            self._held = held.pop_all()

    @property
    def ledger(self) -> Ledger | None:
        """The residual ledger, where one was asked for."""
        return None if self.watch is None else self.watch.ledger

    def follow(self) -> None:
        """Let the cache follow the plan in force. Before each step."""
        if self.cache is not None:
            self.cache.paused = self.guide.probing
            self.cache.follow(self.guide.lowest)

    def close(self) -> None:
        """Leave model and optimizer as they were. The error map stays readable."""
        self._held.close()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What a resumed run needs, by part."""
        parts = {
            "guide": self.guide,
            "spending": self.spending,
            "prefix_cache": self.cache,
            "residuals": self.ledger,
        }
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from `state_dict`; empty where a checkpoint was written without us.

        Raises:
            InputError: It does not go together, or no one knows what of the budget is spent.
        """
        if not state or (self.spending is not None and "spending" not in state):
            begin_anew(self.spending, step)
        if state:
            self.guide.load_state_dict(state["guide"])
        if self.spending is not None:
            self.spending.load_state_dict(state["spending"])
        elif "spending" in state:
            warn(
                "this checkpoint is of a run with a budget, and now there is none: all steps are "
                "taken"
            )
        if self.cache is not None and "prefix_cache" in state:
            self.cache.load_state_dict(state["prefix_cache"])
        if self.watch is not None:
            self.watch.resume(state.get("residuals"), step)

    def _probed(self, count: int) -> Iterator[Tensor]:
        """The user's probe, which may train what is frozen else."""
        assert self._probe is not None
        paused = self.cache is not None and self.cache.paused
        if self.cache is not None:
            self.cache.paused = True
        yield from self._probe(count)
        if self.cache is not None:
            self.cache.paused = paused
