"""Lightning: one callback.

trainer = lightning.Trainer(..., callbacks=[RGFTCallback(rgft.Config())])
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rgft.config import Config
from rgft.costs import FlopMeter
from rgft.errors import EngagementError, InputError
from rgft.execution.parallel import many, refuse_engines
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from rgft.guide import Guide
from rgft.integrations.guidance import Guidance, Wishes
from rgft.integrations.pacing import pace
from rgft.residuals import Ledger
from rgft.scoring import Probe
from rgft.spending import Budget, Spending, parse_budget


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
        self.ledger: Ledger | None = None
        self._wishes, self._network = Wishes(probe, prefix_cache, residuals), network
        self._budget = None if budget is None else parse_budget(str(budget))
        self._guidance: Guidance | None = None
        self._saved: Mapping[str, Any] = {}
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
            self._count(trainer, network, self._budget, steps)
        config = replace(self.config, total_steps=self.config.total_steps or steps)
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        self._guidance = guidance = Guidance(
            network, trainer.optimizers[0], config, self._wishes, self.spending, dataset
        )
        self.guide, self.cache, self.ledger = guidance.guide, guidance.cache, guidance.ledger
        saved, self._saved = self._saved, {}
        if saved or trainer.global_step:
            guidance.resume(saved, trainer.global_step)
        if self.spending is not None:
            trainer.should_stop = trainer.should_stop or self.spending.finished

    def _count(
        self, trainer: lightning.Trainer, network: nn.Module, budget: Budget, steps: int
    ) -> None:
        """Count what is spent of the budget, and let the schedule follow it."""
        batches = steps * trainer.accumulate_grad_batches
        self.spending = Spending(FlopMeter(network), budget, batches=batches)
        for scheduler in trainer.lr_scheduler_configs:
            if scheduler.interval != "step":
                raise InputError(
                    f"the scheduler's interval is {scheduler.interval!r}, which a budget "
                    "cannot pace; return {'scheduler': ..., 'interval': 'step'}"
                )
            pace(scheduler.scheduler, self.spending, steps)

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Let the cache follow the plan in force."""
        del trainer, args
        assert self._guidance is not None
        self._guidance.follow()

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Note what the step costs, before anyone asks: the guide, and then the scheduler.

        Raises:
            InputError: The network that the budget counts was not called.
        """
        del trainer, args
        if self.spending is None:
            return
        if not self.spending.meter.batches:
            raise InputError(
                "training_step did not call the network that the budget counts; name the one that "
                "it calls: RGFTCallback(..., network='...')"
            )
        self.spending.step()

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Stop when the budget is spent."""
        del args
        assert self._guidance is not None
        if self._guidance.watch is not None:
            self._guidance.watch.check_seen()
        if self.spending is not None and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = trainer.should_stop or self.spending.finished

    def on_train_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Let go of the optimizer. The error map stays readable."""
        del trainer, args
        self._let_go()
        if self._guidance is not None and self._guidance.watch is not None:
            self._guidance.watch.write()

    def on_exception(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Leave the network as it was."""
        del trainer, args
        with suppress(EngagementError):  # what ended the training is said already
            self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes to its checkpoints."""
        return {} if self._guidance is None else dict(self._guidance.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer to bind to."""
        self._saved = state_dict

    def _let_go(self) -> None:
        """End the guide, what goes with it, and the counting, as far as there are any."""
        if self.spending is not None:
            self.spending.meter.close()
        if self._guidance is not None:
            self._guidance.close()


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
    refuse_engines(trainer.model, trainer.optimizers[0])
    if many() and not isinstance(trainer.model, DistributedDataParallel):
        raise InputError(
            f"the strategy is {type(trainer.strategy).__name__}; allowed in several processes: "
            "DDP, strategy='ddp_find_unused_parameters_true'"
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
