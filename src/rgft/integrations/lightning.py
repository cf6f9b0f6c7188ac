"""Lightning: one callback.

trainer = lightning.Trainer(..., callbacks=[RGFTCallback(rgft.Config())])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from torch import nn

from rgft.config import Config
from rgft.costs import FlopMeter
from rgft.errors import InputError
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from rgft.guide import Guide
from rgft.integrations.counted_cache import counted_cache
from rgft.integrations.foreign_checkpoint import begin_anew
from rgft.integrations.loss_watch import LossWatch
from rgft.integrations.pacing import pace
from rgft.residuals import Ledger
from rgft.scoring import Probe
from rgft.spending import Spending, parse_budget


class RGFTCallback(lightning.Callback):  # type: ignore[misc]
    """Guides a Lightning Trainer. The state travels in its checkpoints and resumes exactly.

    Lightning runs forward and backward inside `optimizer.step(closure)`; the guide runs the closure
    before it looks at the gradients.

    Args:
        config: What to do; `total_steps` is filled in from the Trainer.
        probe: See `Guide`.
        budget: A share of full fine-tuning over the Trainer's steps (0.3), or a time ("20min"). A
            scheduler of the step then follows the budget, and training stops when it is spent.
        prefix_cache: Where to keep what the frozen deepest layers put out, for a `training_step`
            that calls its network with `sample_ids`; None to compute it at each visit.
        network: Name of the attribute of the LightningModule that holds the network, as
            `training_step` calls it; None for its only child with parameters.
        residuals: Where to write how wrong the network was on each training sample, as Parquet,
            when training ends; for a `training_step` that calls its network with `labels` and with
            `sample_ids`, the samples' positions (see `LossWatch`).

    Attributes:
        guide: The guide, from the start of training on.
        spending: What has been spent, where there is a budget.
        cache: The prefix cache, where one was asked for.
        ledger: The residual ledger, where one was asked for.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - all have defaults
        self,
        config: Config | None = None,
        probe: Probe | None = None,
        budget: float | str | None = None,
        prefix_cache: Storage | None = None,
        network: str | None = None,
        residuals: str | Path | None = None,
    ) -> None:
        self.config = config or Config()
        self.guide: Guide | None = None
        self.spending: Spending | None = None
        self.cache: PrefixCache | None = None
        self._probe, self._storage, self._network = probe, prefix_cache, network
        self._budget = None if budget is None else parse_budget(str(budget))
        self._saved: Mapping[str, Any] = {}
        self.ledger: Ledger | None = None
        self._residuals = residuals
        self._watch: LossWatch | None = None
        if self._budget is not None and self._budget.auto:
            raise InputError(
                "budget='auto' decides between evaluations, which Lightning does not let a "
                "callback ask for; give a share or a time, or use the Hugging Face Trainer"
            )

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Bind to the network and the optimizer; on resuming, take the saved state over.

        Raises:
            InputError: Something that the Trainer is set to do does not go with the guide.
        """
        self._let_go()
        _check(trainer, pl_module)
        network = _network(pl_module, self._network)
        steps = int(trainer.estimated_stepping_batches)
        if self._budget is not None:
            batches = steps * trainer.accumulate_grad_batches
            self.spending = Spending(FlopMeter(network), self._budget, batches=batches)
            for scheduler in trainer.lr_scheduler_configs:
                if scheduler.interval != "step":
                    raise InputError(
                        f"the scheduler's interval is {scheduler.interval!r}, which a budget "
                        "cannot pace; return {'scheduler': ..., 'interval': 'step'}"
                    )
                pace(scheduler.scheduler, self.spending, steps)
        config = replace(self.config, total_steps=self.config.total_steps or steps)
        optimizer = trainer.optimizers[0]
        self.guide = Guide(network, optimizer, config, probe=self._probe, spending=self.spending)
        if self._storage is not None:
            meter = None if self.spending is None else self.spending.meter
            self.cache = counted_cache(network, self._storage, meter)
        if self._residuals is not None:
            dataset = getattr(trainer.train_dataloader, "dataset", None)
            self._watch = LossWatch(network, dataset, self._residuals)
            self._watch.beside(self.cache)
            self.ledger = self._watch.ledger
        self._resume(trainer)

    def _resume(self, trainer: lightning.Trainer) -> None:
        """Take over what `load_state_dict` was given."""
        saved, self._saved = self._saved, {}
        if self._watch is not None and trainer.global_step:
            self._watch.resume(saved.get("residuals"), trainer.global_step)
        if trainer.global_step and not saved:
            begin_anew(self.spending, trainer.global_step)
        if not saved:
            return
        assert self.guide is not None
        self.guide.load_state_dict(saved["guide"])
        if self.spending is not None:
            if "spending" not in saved:
                begin_anew(self.spending, trainer.global_step)
            self.spending.load_state_dict(saved["spending"])
            trainer.should_stop = self.spending.finished
        if self.cache is not None and "prefix_cache" in saved:
            self.cache.load_state_dict(saved["prefix_cache"])

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Let the cache follow the plan in force."""
        del trainer, args
        if self.cache is not None and self.guide is not None:
            self.cache.paused = self.guide.probing
            self.cache.follow(self.guide.lowest)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Note what a step has cost; stop when the budget is spent.

        Raises:
            InputError: The network that the budget counts was not called.
        """
        if self._watch is not None:
            self._watch.check_seen()
        if self.spending is None or trainer.fit_loop._should_accumulate():
            return
        if not self.spending.meter.batches:
            raise InputError(
                "training_step did not call the network that the budget counts; name the one that "
                "it calls: RGFTCallback(..., network='...')"
            )
        self.spending.step()
        trainer.should_stop = trainer.should_stop or self.spending.finished

    def on_train_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Let go of the optimizer. The error map stays readable."""
        del trainer, args
        self._let_go()
        if self._watch is not None:
            self._watch.write()

    def on_exception(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Leave the network as it was."""
        del trainer, args
        if self.cache is not None:
            self.cache.close()
        if self._watch is not None:
            self._watch.close()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes to its checkpoints."""
        state: dict[str, Any] = {}
        if self.guide is not None:
            state["guide"] = self.guide.state_dict()
        if self.spending is not None:
            state["spending"] = self.spending.state_dict()
        if self.cache is not None:
            state["prefix_cache"] = self.cache.state_dict()
        if self.ledger is not None:
            state["residuals"] = self.ledger.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer to bind to."""
        self._saved = state_dict

    def _let_go(self) -> None:
        """End the cache, the guide, the counting and the watch, as far as there are any."""
        if self._watch is not None:
            self._watch.close()
        if self.cache is not None:
            self.cache.close()
        if self.guide is not None:
            self.guide.close()
        if self.spending is not None:
            self.spending.meter.close()


def _check(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Refuse what would go on without the guide."""
    if len(trainer.optimizers) != 1:
        raise InputError(
            f"configure_optimizers gave {len(trainer.optimizers)} optimizers; allowed: one, over "
            "the parameters of the network"
        )
    if not module.automatic_optimization:
        raise InputError(
            "automatic_optimization is False: call rgft.Guide(network, optimizer) in your own "
            "loop, without this callback"
        )


def _network(module: lightning.LightningModule, name: str | None) -> nn.Module:
    """What training_step calls."""
    children = {n: c for n, c in module.named_children() if any(True for _ in c.parameters())}
    if name is None and len(children) != 1:
        raise InputError(
            f"the LightningModule holds {', '.join(children) or 'no module'}; say which one is to "
            "be guided: RGFTCallback(..., network='...')"
        )
    if name is not None and name not in children:
        raise InputError(f"network is {name!r}; allowed: {', '.join(children) or 'nothing here'}")
    network: nn.Module = children[name or next(iter(children))]
    return network
