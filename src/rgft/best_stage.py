"""Keeps the checkpoint of the best stage of a run that finds its own budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rgft.errors import InputError
from rgft.spending import Spending


class BestStage(TrainerCallback):  # type: ignore[misc]
    """Saves what is evaluated, and names the best checkpoint, which the Trainer then keeps.

    For a Trainer that evaluates and saves when it is told to alone.

    Args:
        spending: Whose stages are judged, before this callback is asked.
    """

    def __init__(self, spending: Spending) -> None:
        self._spending = spending
        self._judged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the checkpoint again when a run is resumed, in whatever folder it is now.

        Raises:
            InputError: It is gone.
        """
        del control, kwargs
        self._judged = len(self._spending.stages)
        if not self._judged:
            return
        checkpoint = _checkpoint(args, int(state.best_global_step))
        if not checkpoint.is_dir():
            raise InputError(
                f"{checkpoint}, the best model of the run so far, is gone; "
                "start anew with --overwrite"
            )
        state.best_model_checkpoint = str(checkpoint)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a checkpoint written where there is an evaluation."""
        del args, state, kwargs
        control.should_save = control.should_save or control.should_evaluate

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the checkpoint that is about to be written, if its stage is the best so far."""
        del control, kwargs
        stages = self._spending.stages
        if len(stages) > self._judged and self._spending.best == len(stages) - 1:
            state.best_global_step = state.global_step
            state.best_model_checkpoint = str(_checkpoint(args, state.global_step))
        self._judged = len(stages)


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
