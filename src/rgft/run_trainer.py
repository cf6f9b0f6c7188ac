"""The Trainer of a run: which samples it visits, and how wrong the model was on each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from rgft import metrics
from rgft.batches import SAMPLE_IDS
from rgft.checkpoints import VISITS
from rgft.recorder import RunRecorder, diverged
from rgft.residuals import Ledger
from rgft.sample_losses import sample_correct, sample_losses
from rgft.sampling import weighted_loss
from rgft.tasks import Kind
from rgft.visits import VisitBatches, VisitSampler


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that keeps the residual ledger, tells every loss, and whose metrics must be finite.

    The Trainer's own running mean of the loss is not in its checkpoints.

    Args:
        recorder: Told every loss.
        kind: Of the task.
        ledger: Of the training samples.
        visits: Draws the samples, for as many steps as there are; None for the Trainer's epochs.
        identified: Whether the model is given the ids of the samples, for a prefix cache.
        settings: The Trainer's own.
    """

    def __init__(
        self,
        recorder: RunRecorder,
        kind: Kind,
        ledger: Ledger,
        visits: VisitSampler | None,
        *,
        identified: bool,
        **settings: Any,
    ) -> None:
        super().__init__(**settings, compute_metrics=self._metrics)
        self._recorder, self._kind, self._ledger = recorder, kind, ledger
        self._visits, self._identified = visits, identified

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the given visits, else the Trainer's own."""
        if self._visits is None:
            own: DataLoader[Any] = super().get_train_dataloader()
            return own
        return DataLoader(
            self.train_dataset,
            batch_sampler=VisitBatches(self._visits),
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else it would draw from the one that is resumed
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._recorder.add_loss(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **settings: Any
    ) -> Any:
        """The model's own loss, or one that is weighted by how often its samples are visited."""
        ids = inputs.get(SAMPLE_IDS)
        given = {k: v for k, v in inputs.items() if self._identified or k != SAMPLE_IDS}
        loss, outputs = super().compute_loss(model, given, return_outputs=True, **settings)
        if ids is not None:
            loss = self._noted(ids, loss, outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _noted(self, ids: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Take the losses of training samples into the ledger."""
        losses = sample_losses(logits, labels, self._kind)
        correct = sample_correct(logits, labels, self._kind)
        weights = None if self._visits is None else self._visits.weights
        self._ledger.update(ids, losses, correct)
        if self._visits is None or weights is None or self._visits.skip == 0:
            return loss
        # a step of the usual size: see `weighted_loss`
        size = self._visits.batch_size * len(weights) / self._visits.visits
        return weighted_loss(losses, weights[ids.cpu()].to(losses.device), size)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and beside a checkpoint's the ledger and the place among the visits."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            torch.save(self._visiting(), Path(output_dir) / VISITS)

    def go_on(self, checkpoint: Path) -> None:
        """Take over what `save_model` wrote beside a checkpoint."""
        state = torch.load(checkpoint / VISITS, weights_only=True)
        self._ledger.load_state_dict(state["ledger"])
        if self._visits is not None:
            self._visits.load_state_dict(state["visits"])

    def _visiting(self) -> dict[str, Any]:
        state = {"ledger": self._ledger.state_dict()}
        if self._visits is not None:
            state["visits"] = self._visits.state_dict()
        return state

    def _metrics(self, prediction: Any) -> dict[str, float]:
        if not np.isfinite(prediction.predictions).all():
            raise diverged("output of the model", math.nan, self.state.global_step)
        return metrics.compute(self._kind, prediction.predictions, prediction.label_ids)
