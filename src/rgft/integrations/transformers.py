"""Hugging Face Trainer: one callback.

trainer = Trainer(..., callbacks=[RGFTCallback(rgft.Config())])
"""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rgft.config import Config
from rgft.costs import FlopMeter
from rgft.errors import InputError
from rgft.execution.parallel import many
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from rgft.guide import Guide
from rgft.integrations.counted_cache import counted_cache
from rgft.integrations.foreign_checkpoint import begin_anew
from rgft.integrations.loss_watch import LossWatch
from rgft.integrations.pacing import pace, set_rates
from rgft.residuals import Ledger
from rgft.scoring import Probe
from rgft.spending import Spending, parse_budget
from rgft.stages import Yardstick

UNSPENT = 0.9  # a run that ends with less of its budget spent says so


def encode_state(state: Mapping[str, Any]) -> str:
    """Tensors, numbers and strings as text that fits in JSON."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return base64.b85encode(zlib.compress(buffer.getvalue())).decode("ascii")


def decode_state(text: str) -> dict[str, Any]:
    """What `encode_state` was given. Never runs code from the data."""
    buffer = io.BytesIO(zlib.decompress(base64.b85decode(text)))
    return dict(torch.load(buffer, weights_only=True))


class RGFTCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Guides a Trainer. The state travels in the Trainer's own checkpoints and resumes exactly.

    Args:
        config: What to do; `total_steps` is filled in from the Trainer.
        probe: See `Guide`.
        budget: What the run may spend: a share of full fine-tuning over the Trainer's steps (0.3),
            or a time ("20min"). The learning-rate schedule then follows the budget, and training
            stops when it is spent; "auto" stops it when a doubling of the compute buys too little
            of the Trainer's `metric_for_best_model` (else of the evaluation loss); or a `Spending`
            that was made before.
        prefix_cache: Where to keep what the frozen deepest layers put out, for batches that carry
            `sample_ids` (see `PrefixCache`); None to compute it at each visit.
        meter: Counts FLOPs, where something else than a budget needs them.
        residuals: Where to write how wrong the model was on each training sample, as Parquet, when
            training ends; for samples that carry their position as `sample_ids` (see `LossWatch`).

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
        budget: float | str | Spending | None = None,
        prefix_cache: Storage | None = None,
        meter: FlopMeter | None = None,
        residuals: str | Path | None = None,
    ) -> None:
        self.config = config or Config()
        self.probe = probe
        self.cache: PrefixCache | None = None
        self.ledger: Ledger | None = None
        self._storage, self._meter, self._residuals = prefix_cache, meter, residuals
        self._watch: LossWatch | None = None
        self.guide: Guide | None = None
        self.spending = budget if isinstance(budget, Spending) else None
        self._scheduler: LambdaLR | None = None
        self._budget = None
        if budget is not None and not isinstance(budget, Spending):
            self._budget = parse_budget(str(budget))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind to the model and the optimizer; on resuming, take the saved state over."""
        self._let_go()  # of a train() before this one, perhaps cut off
        model: nn.Module = kwargs["model"]
        config = replace(self.config, total_steps=self.config.total_steps or state.max_steps)
        if self._budget is not None:
            batches = state.max_steps * args.gradient_accumulation_steps
            yardstick = _yardstick(args) if self._budget.auto else None
            self.spending = Spending(
                FlopMeter(model), self._budget, batches=batches, yardstick=yardstick
            )
        if self.spending is not None:
            self._scheduler = pace(kwargs["lr_scheduler"], self.spending, state.max_steps)
        optimizer = kwargs["optimizer"]
        probe = None if self.probe is None else self._probed
        self.guide = Guide(
            model, optimizer, config, probe=probe, spending=self.spending, meter=self._meter
        )
        if self._storage is not None and many():
            raise InputError(
                "prefix_cache works in one process: with several, samples come back to others than "
                "those that have stored them; drop it"
            )
        if self._storage is not None:
            meter = self._meter or (None if self.spending is None else self.spending.meter)
            self.cache = counted_cache(model, self._storage, meter)
        if self._residuals is not None:
            self._begin_to_watch(args, model, kwargs["train_dataloader"])
        self._take_over(state, control)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def _take_over(self, state: TrainerState, control: TrainerControl) -> None:
        """Go on from a checkpoint, where the Trainer does."""
        if not state.global_step:
            return
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        attributes = (saved or {}).get("attributes", {})
        if not saved:
            begin_anew(self.spending, state.global_step)
        elif self.guide is not None:
            self.guide.load_state_dict(decode_state(attributes["guide"]))
        if saved and self.spending is not None:
            if "spending" not in attributes:
                begin_anew(self.spending, state.global_step)
            self.spending.load_state_dict(attributes["spending"])
            control.should_training_stop = self.spending.finished
        if self.cache is not None and "prefix_cache" in attributes:
            self.cache.load_state_dict(decode_state(attributes["prefix_cache"]))
        if self._watch is not None:
            text = attributes.get("residuals")
            self._watch.resume(None if text is None else decode_state(text), state.global_step)

    def _begin_to_watch(self, args: TrainingArguments, model: nn.Module, loader: Any) -> None:
        """Keep the residual ledger."""
        assert self._residuals is not None
        if args.remove_unused_columns:
            raise InputError(
                "residuals: the Trainer removes sample_ids from the batches; give it "
                "remove_unused_columns=False"
            )
        self._watch = LossWatch(model, loader.dataset, self._residuals)
        self._watch.beside(self.cache)
        self.ledger = self._watch.ledger

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the cache follow the plan in force.

        Raises:
            InputError: A stage has ended, and the Trainer's evaluation has not the metric that it
                should be judged by.
        """
        del state, control, kwargs
        if self._stage_ended:
            raise InputError(
                f"the evaluation has no {_metric(args)!r}, which a budget that is auto is judged "
                "by; name one that it has as metric_for_best_model"
            )
        if self.cache is not None and self.guide is not None:
            self.cache.paused = self.guide.probing
            self.cache.follow(self.guide.lowest)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what the step has cost, before the scheduler is asked for the next rate."""
        del args, state, control, kwargs
        if self.spending is not None:
            self.spending.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop when the budget is spent; ask for an evaluation at the end of a stage."""
        del state, kwargs
        if self._watch is not None:
            self._watch.check_seen()
        if self._stage_ended:
            control.should_evaluate = True
            control.should_save = control.should_save or args.load_best_model_at_end
        elif self.spending is not None and self.spending.finished:
            control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge a stage that has ended: begin the next one, or stop."""
        del state
        value = kwargs["metrics"].get(f"eval_{_metric(args)}")
        if value is None or not self._stage_ended:
            return
        assert self.spending is not None and self._scheduler is not None
        if self.spending.close_stage(float(value)):
            set_rates(self._scheduler)
        else:
            control.should_training_stop = True

    @property
    def _stage_ended(self) -> bool:
        """Whether there is a stage that has to be judged now."""
        spending = self.spending
        if spending is None or not spending.budget.auto:
            return False
        return spending.stage_ended and not spending.finished

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer. The error map stays readable."""
        del args, state, control, kwargs
        self._let_go()
        if self._watch is not None:
            self._watch.write()
        if self._budget is not None and self.spending is not None:
            self.spending.meter.close()
            self._say_what_is_left(self.spending)

    def _say_what_is_left(self, spending: Spending) -> None:
        """Warn of steps that were too few for the budget."""
        if spending.budget.auto and not spending.finished:
            left = "in the middle of a stage"
        elif not spending.budget.auto and spending.progress < UNSPENT:
            left = f"with {spending.progress:.0%} of the budget spent"
        else:
            return
        warnings.warn(
            f"training ended {left}: its steps were cheaper than the budget allows; raise "
            "num_train_epochs, or lower the budget",
            RuntimeWarning,
            stacklevel=3,
        )

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json."""
        attributes: dict[str, Any] = {}
        if self.guide is not None:
            attributes["guide"] = encode_state(self.guide.state_dict())
        if self.spending is not None:
            attributes["spending"] = self.spending.state_dict()
        if self.cache is not None:
            attributes["prefix_cache"] = encode_state(self.cache.state_dict())
        if self.ledger is not None:
            attributes["residuals"] = encode_state(self.ledger.state_dict())
        return {"args": {}, "attributes": attributes}

    def _probed(self, count: int) -> Iterator[Tensor]:
        """The user's probe, which may train what is frozen else."""
        assert self.probe is not None
        paused = self.cache is not None and self.cache.paused
        if self.cache is not None:
            self.cache.paused = True
        yield from self.probe(count)
        if self.cache is not None:
            self.cache.paused = paused

    def _let_go(self) -> None:
        """End the cache, the guide and the watch, as far as there are any."""
        if self._watch is not None:
            self._watch.close()
        if self.cache is not None:
            self.cache.close()
        if self.guide is not None:
            self.guide.close()


def _metric(args: TrainingArguments) -> str:
    """Name of the metric that the Trainer compares models by."""
    return str(args.metric_for_best_model or "loss").removeprefix("eval_")


def _yardstick(args: TrainingArguments) -> Yardstick:
    """What the stages of a Trainer of the user's own are judged by."""
    if args.eval_strategy == "no":
        raise InputError(
            "budget='auto' judges by evaluations: give the Trainer an eval_dataset, and an "
            "eval_strategy other than 'no'"
        )
    name = _metric(args)
    lower = name.endswith("loss") if args.greater_is_better is None else not args.greater_is_better
    return Yardstick(name, lower_is_better=lower)
