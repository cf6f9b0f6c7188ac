"""The Trainer of a run: which samples it visits, and how wrong the model was on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from rgft import metrics
from rgft.batch_share import Share, share
from rgft.checkpoints import VISITS
from rgft.loss_percentiles import LossPercentiles
from rgft.processes import Processes
from rgft.recorder import RunRecorder, diverged
from rgft.residuals import SAMPLE_IDS, Ledger
from rgft.sample_losses import sample_correct, sample_losses, sample_tokens
from rgft.sampling import weighted_loss
from rgft.tasks import Kind
from rgft.visits import VisitBatches, VisitSampler


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a run goes through its training samples.

    Attributes:
        ledger: How wrong the model was on each.
        visits: Draws them, for as many steps as there are; None for the Trainer's epochs.
        balance: What a sample of each class counts, `[C]`; None for all alike.
        percentiles: Chooses which samples of a batch get a backward pass; None for all.
    """

    ledger: Ledger
    visits: VisitSampler | None
    balance: Tensor | None
    percentiles: LossPercentiles | None = None

    @property
    def weighs(self) -> bool:
        """Whether samples count differently."""
        return self.balance is not None or (self.visits is not None and self.visits.skip > 0)

    def weighted(self, ids: Tensor, labels: Tensor, losses: Tensor, whole: int) -> Tensor | None:
        """The loss of a batch from those of its samples; None where all count alike.

        Args:
            ids: Of the samples.
            labels: Of the samples.
            losses: Of the samples.
            whole: How many are in the batch; some may be in other processes.
        """
        if not self.weighs:
            return None
        skips = self.visits is not None and self.visits.skip > 0
        weights, size = torch.ones_like(losses), float(whole)
        if self.visits is not None and skips:
            of = self.visits.weights
            weights *= of[ids.cpu()].to(weights)
            # a step of the usual size: see `weighted_loss`
            size = self.visits.batch_size * len(of) / self.visits.visits
        if self.balance is not None:
            weights *= self.balance.to(weights)[labels]
        return weighted_loss(losses, weights, size)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        state = {"ledger": self.ledger.state_dict()}
        if self.visits is not None:
            state["visits"] = self.visits.state_dict()
        if self.percentiles is not None:
            state["percentiles"] = self.percentiles.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.ledger.load_state_dict(state["ledger"])
        if self.visits is not None:
            self.visits.load_state_dict(state["visits"])
        if self.percentiles is not None:
            self.percentiles.load_state_dict(state["percentiles"])


Measure = Callable[[Any, Any], dict[str, float]]


class Resumable(Protocol):
    """What has a state beside that of the Trainer."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that keeps the residual ledger, tells every loss, and whose metrics must be finite.

    The Trainer's own running mean of the loss is not in its checkpoints.

    Args:
        recorder: Told every loss.
        kind: Of the loss, as `sample_losses` names it.
        sampling: How it goes through the training samples.
        identified: Whether the model is given the ids of the samples, for a prefix cache.
        measure: Metrics from what evaluation has kept of the model's output, and the labels.
        processes: Those that a batch is shared out to; each is handed all of it.
        allocation: Prunes ranks, if the model is one of AdaLoRA, whose loss has a term of its own.
        settings: The Trainer's own.
    """

    def __init__(  # noqa: PLR0913 - what a run consists of
        self,
        recorder: RunRecorder,
        kind: str,
        sampling: Sampling,
        *,
        measure: Measure,
        identified: bool,
        processes: Processes | None = None,
        allocation: Resumable | None = None,
        **settings: Any,
    ) -> None:
        settings.setdefault("preprocess_logits_for_metrics", _first)
        super().__init__(**settings, compute_metrics=self._metrics)
        self._recorder, self._kind, self._measure = recorder, kind, measure
        self._sampling, self._identified = sampling, identified
        self._processes = processes
        self._place = (0, 1) if processes is None else (processes.rank, processes.size)
        self._share = Share(0, 0, 0, 1)  # of no batch yet
        self._counts: list[int] | None = None
        if processes is not None:
            sampling.ledger.share(processes)
            self.model_accepts_loss_kwargs = False  # a model's loss is the mean over its rows
            torch.manual_seed(self.args.seed + processes.rank)  # dropout is each one's own
        self._allocation = allocation

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the given visits, else the Trainer's own."""
        if self._sampling.visits is None:
            own: DataLoader[Any] = super().get_train_dataloader()
            if self._processes is not None:  # whole batches, of which this one takes its rows
                shard: Any = own.batch_sampler
                shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
            return own
        return DataLoader(
            self.train_dataset,
            batch_sampler=VisitBatches(self._sampling.visits),
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else it would draw from the one that is resumed
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none where a run is resumed whose budget was spent already."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """One forward and backward pass, of the rows that this process has."""
        labels = inputs["labels"]
        self._share = share(len(labels), *self._place)
        if self._processes is not None and labels.ndim > 1:
            # a mean over tokens, of which rows have more or fewer
            self._counts = sample_tokens(labels, self._kind).tolist()
        inputs = self._share.of(inputs)
        with self._recorder.uncounted(self._share.idle):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._recorder.add_loss(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **settings: Any
    ) -> Any:
        """The model's own loss, or one that is weighted by how often its samples are visited."""
        ids = inputs.get(SAMPLE_IDS)
        given = {k: v for k, v in inputs.items() if self._identified or k != SAMPLE_IDS}
        if ids is not None and self._sampling.percentiles is not None:
            loss, outputs = self._loss_of_hard(model, given, ids, self._sampling.percentiles)
            return (loss, outputs) if return_outputs else loss
        loss, outputs = super().compute_loss(model, given, return_outputs=True, **settings)
        if ids is not None:
            loss = self._noted(ids, loss, outputs.logits, inputs["labels"])
        elif self._allocation is not None:
            loss = sample_losses(outputs.logits, inputs["labels"], self._kind).mean()
        return (loss, outputs) if return_outputs else loss

    def _loss_of_hard(
        self, model: Any, given: dict[str, Any], ids: Tensor, percentiles: LossPercentiles
    ) -> tuple[Tensor, Any]:
        """The mean loss of the hard samples of a batch, which a first forward pass tells."""
        meter, labels = self._recorder.meter, given["labels"]
        with torch.no_grad(), meter.previewing():
            logits = model(**given).logits
        losses = sample_losses(logits, labels, self._kind)
        self._sampling.ledger.update(ids, losses, sample_correct(logits, labels, self._kind))
        rows = percentiles.choose(losses).to(labels.device)
        with meter.probing():
            outputs = model(**{name: value[rows] for name, value in given.items()})
        losses = sample_losses(outputs.logits, labels[rows], self._kind)
        weighted = self._sampling.weighted(ids[rows], labels[rows], losses, len(rows))
        return losses.mean() if weighted is None else weighted, outputs

    def _noted(self, ids: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Take the losses of training samples into the ledger."""
        with torch.set_grad_enabled(self._sampling.weighs):
            losses = sample_losses(logits, labels, self._kind)
        correct = sample_correct(logits, labels, self._kind)
        part = self._share
        weighted = self._sampling.weighted(ids, labels, losses, part.whole)
        here = slice(0, part.stop - part.start)
        right = None if correct is None else correct[here]
        self._sampling.ledger.update(ids[here], losses[here], right)
        if weighted is None or part.idle:
            return loss * part.weight(self._counts)
        total = weighted * part.size  # processes are averaged, and its sum is to be over all
        if self._allocation is None:
            return total
        tokens = 1 if labels.ndim == 1 else sample_tokens(labels, self._kind)
        own = (losses * tokens).sum() / (torch.ones_like(losses) * tokens).sum()
        return total + (loss - own)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and beside a checkpoint's the ledger and the place among the visits."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            state = self._sampling.state_dict()
            if self._allocation is not None:
                state["allocation"] = self._allocation.state_dict()
            torch.save(state, Path(output_dir) / VISITS)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The weights of a checkpoint, but for AdaLoRA's, which its allocation has."""
        if self._allocation is None:
            super()._load_from_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process writes its own; a checkpoint with a state has those of all."""
        super()._save_rng_state(output_dir)
        if self._processes is not None:
            self._processes.wait()

    def load_best(self) -> None:
        """The model of the best stage in place of the last, where there are stages.

        The Trainer's own `load_best_model_at_end` does so before the prefix cache is closed, which
        would drop what it holds, and also where a run is only interrupted.
        """
        if self._processes is not None:
            self._processes.wait()  # for the first, which has written it
        if self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def go_on(self, checkpoint: Path) -> None:
        """Take over what `save_model` wrote beside a checkpoint."""
        state = torch.load(checkpoint / VISITS, weights_only=True)
        self._sampling.load_state_dict(state)
        if self._allocation is not None:
            self._allocation.load_state_dict(state["allocation"])

    def _metrics(self, prediction: Any) -> dict[str, float]:
        if not np.isfinite(prediction.predictions).all():
            raise diverged("output of the model", math.nan, self.state.global_step)
        return self._measure(prediction.predictions, prediction.label_ids)


def of_labels(
    kind: Kind, logits: Any, labels: Any, processes: Processes | None
) -> dict[str, float]:
    """The metrics of a task of labels."""
    found = metrics.compute(kind, logits, labels)
    if processes is not None:  # the Trainer's own mean counts rows that fill batches up
        losses = sample_losses(torch.as_tensor(logits), torch.as_tensor(labels), kind)
        found["loss"] = float(losses.mean())
    return found


def _first(outputs: Any, labels: Any) -> Any:
    """The logits, without what the encoder of an encoder-decoder put out."""
    del labels
    return outputs[0] if isinstance(outputs, tuple) else outputs
