"""Hugging Face Trainer: one callback.

trainer = Trainer(..., callbacks=[RGFTCallback(rgft.Config())])
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rgft.config import Config
from rgft.costs import FlopMeter
from rgft.errors import InputError, warn
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from rgft.guide import Guide
from rgft.integrations.guidance import Guidance, Wishes
from rgft.integrations.pacing import pace, set_rates
from rgft.residuals import Ledger
from rgft.scoring import Probe
from rgft.spending import Spending, parse_budget
from rgft.stages import Yardstick

PLAIN = ("spending",)  # parts of the state that have no tensors
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
        self.guide: Guide | None = None
        self.cache: PrefixCache | None = None
        self.ledger: Ledger | None = None
        self._wishes = Wishes(probe, prefix_cache, residuals, meter)
        self._guidance: Guidance | None = None
        self.spending = budget if isinstance(budget, Spending) else None
        self._scheduler: LambdaLR | None = None
        self._budget = None
        if budget is not None and not isinstance(budget, Spending):
            self._budget = parse_budget(str(budget))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind to the model and the optimizer; on resuming, take the saved state over.

        Raises:
            InputError: Something asked for does not go with the Trainer. The model is left as it
                was.
        """
        self._let_go()  # of a train() before this one, perhaps cut off
        try:
            self._begin(args, state, kwargs["model"], kwargs)
        except InputError:
            self._let_go()
            raise
        if self.spending is not None and state.global_step:
            control.should_training_stop = self.spending.finished
        state.stateful_callbacks[type(self).__name__] = self.state()

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, given: dict[str, Any]
    ) -> None:
        """Set up what was asked for; go on from a checkpoint, where the Trainer does."""
        if self._wishes.residuals is not None and args.remove_unused_columns:
            raise InputError(
                "residuals: the Trainer removes sample_ids from the batches; give it "
                "remove_unused_columns=False"
            )
        config = replace(self.config, total_steps=self.config.total_steps or state.max_steps)
        if self._budget is not None:
            batches = state.max_steps * args.gradient_accumulation_steps
            yardstick = _yardstick(args) if self._budget.auto else None
            self.spending = Spending(
                FlopMeter(model), self._budget, batches=batches, yardstick=yardstick
            )
        if self.spending is not None:
            self._scheduler = pace(given["lr_scheduler"], self.spending, state.max_steps)
        dataset = getattr(given.get("train_dataloader"), "dataset", None)
        self._guidance = guidance = Guidance(
            model, given["optimizer"], config, self._wishes, self.spending, dataset
        )
        self.guide, self.cache, self.ledger = guidance.guide, guidance.cache, guidance.ledger
        if state.global_step:
            saved = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
            guidance.resume(_decoded(saved.get("attributes", {})), state.global_step)

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
        assert self._guidance is not None
        self._guidance.follow()

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
        if self._guidance is not None and self._guidance.watch is not None:
            self._guidance.watch.check_seen()
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
        del control, kwargs
        self._let_go()
        if self._guidance is not None and self._guidance.watch is not None:
            self._guidance.watch.write()
        stopped = state.global_step < state.max_steps  # by the budget, or someone who meant to
        if self._budget is not None and self.spending is not None and not stopped:
            longer = "max_steps" if args.max_steps > 0 else "num_train_epochs"
            self._say_what_is_left(self.spending, longer)
        spent = self._budget is not None and self.spending is not None and self.spending.finished
        if spent and stopped and self.guide is not None and self.guide.idle:
            warn(
                "the budget ended before the method's first decision, so that the run was plain "
                "fine-tuning; give a larger budget, or a lower every or warmup"
            )

    def _say_what_is_left(self, spending: Spending, longer: str) -> None:
        """Warn of steps that were too few for the budget; `longer` is what sets their number."""
        if spending.budget.auto and not spending.finished:
            left = "in the middle of a stage"
        elif not spending.budget.auto and spending.progress < UNSPENT:
            left = f"with {spending.progress:.0%} of the budget spent"
        else:
            return
        warn(
            f"training ended {left}: its steps were cheaper than the budget allows; raise "
            f"{longer}, or lower the budget"
        )

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json."""
        state = {} if self._guidance is None else self._guidance.state_dict()
        return {"args": {}, "attributes": {name: _encoded(name, state[name]) for name in state}}

    def _let_go(self) -> None:
        """End the guide, what goes with it, and counting of our own, as far as there are any."""
        if self._budget is not None and self.spending is not None:
            self.spending.meter.close()
        if self._guidance is not None:
            self._guidance.close()


def _encoded(name: str, state: dict[str, Any]) -> Any:
    """A part of the state as JSON can hold it."""
    return state if name in PLAIN else encode_state(state)


def _decoded(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The state that is in a checkpoint, by part."""
    return {n: part if n in PLAIN else decode_state(part) for n, part in attributes.items()}


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
