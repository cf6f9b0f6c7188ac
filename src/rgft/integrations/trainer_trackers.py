"""The trackers that a Trainer reports to get the map too."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from rgft.errors import InputError
from rgft.integrations import trackers
from rgft.integrations.transformers import RGFTCallback

REPORTERS = {
    "mlflow": MLflowCallback,
    "tensorboard": TensorBoardCallback,
    "trackio": TrackioCallback,
    "wandb": WandbCallback,
}


def follow(trainer: Trainer, callback: RGFTCallback) -> None:
    """Have the Trainer log the map with its loss, and show the heatmap when training ends.

    Its trackers (`report_to`) come before the callbacks of its user, so that those can add nothing
    to what is logged; this one is put in front of them.

    Args:
        trainer: It has `callback` among its callbacks.
        callback: Whose map it is.

    Raises:
        InputError: The Trainer does not have the callback, or reports to no tracker that is known.
    """
    callbacks = trainer.callback_handler.callbacks
    if callback not in callbacks:
        raise InputError(
            "the callback is not among the Trainer's; give it to Trainer(callbacks=[...]) first"
        )
    if not any(isinstance(there, tuple(REPORTERS.values())) for there in callbacks):
        raise InputError(
            f"the Trainer reports to none of {', '.join(REPORTERS)}; name one in report_to"
        )
    callbacks.insert(0, _InFront(trainer, callback))


class _InFront(TrainerCallback):  # type: ignore[misc]
    """Sees the logs before the trackers do."""

    def __init__(self, trainer: Trainer, callback: RGFTCallback) -> None:
        self._handler, self._callback = trainer.callback_handler, callback

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the map to the training loss."""
        del args, state, control
        guide = self._callback.guide
        if guide is not None and "loss" in kwargs["logs"]:
            kwargs["logs"].update(trackers.scalars(guide, self._callback.spending))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the heatmap, as long as the trackers have their runs open."""
        del args, control, kwargs
        guide = self._callback.guide
        if guide is None or not state.is_world_process_zero:
            return
        for reporter in self._handler.callbacks:
            for name, kind in REPORTERS.items():
                if isinstance(reporter, kind):
                    run = _run_of(name, reporter)
                    trackers.SHOW[name](run, trackers.figure(guide), state.global_step)


def _run_of(name: str, reporter: Any) -> Any:
    """What `trackers.SHOW` takes: a writer, a run, or the module, which knows its run."""
    if name == "tensorboard":
        return reporter.tb_writer
    module = importlib.import_module(name)
    return module.run if name == "wandb" else module
