"""The Trainer of a run whose model learns to write texts: perplexity, and what it writes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgft.recorder import RunRecorder
from rgft.run_trainer import RunTrainer, Sampling
from rgft.sample_losses import sample_losses, sample_tokens
from rgft.text_metrics import JUDGES
from rgft.text_to_text import PROMPT, REFERENCES, ROW, TextToTextInputs
from rgft.writing import spread, write

MOST = 700.0  # beyond it e^loss is no number


class TextTrainer(RunTrainer):
    """Measures texts token by token, and by what the model writes itself.

    Args:
        recorder: Told every loss.
        inputs: Of the run.
        sampling: How it goes through the training samples.
        metric: Headline metric, which says how written texts are judged.
        settings: Those of `RunTrainer`.

    Attributes:
        written: By split that was evaluated last: what was read and written, with references.
    """

    def __init__(
        self,
        recorder: RunRecorder,
        inputs: TextToTextInputs,
        sampling: Sampling,
        *,
        metric: str,
        **settings: Any,
    ) -> None:
        super().__init__(
            recorder,
            inputs.losses,
            sampling,
            measure=of_tokens,
            preprocess_logits_for_metrics=self._summed,
            **settings,
        )
        self.model_accepts_loss_kwargs = False  # a model's loss is the mean over a batch's tokens
        self._inputs, self._metric = inputs, metric
        self.written: dict[str, list[dict[str, Any]]] = {}

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, and then the model writes."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        rows = spread(dataloader.dataset, self._inputs.writing.rows)
        with self.compute_loss_context_manager():
            model = self.accelerator.unwrap_model(self.model)
            texts = write(model, self._inputs, rows, self._processes)
        references = [row[REFERENCES] for row in rows]
        found = JUDGES[self._metric](texts, references)
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        self.written[prefix] = [
            {ROW: row[ROW], PROMPT: row[PROMPT], "written": text, REFERENCES: row[REFERENCES]}
            for row, text in zip(rows, texts, strict=True)
        ]
        return output

    def _summed(self, logits: Any, labels: Tensor) -> Tensor:
        """Loss and tokens of each row, `[B, 2]`; memory would not hold the logits of a split."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        losses = sample_losses(logits, labels, self._kind, reduction="sum")
        return torch.stack([losses, sample_tokens(labels, self._kind).to(losses)], dim=1)


def of_tokens(rows: Any, labels: Any) -> dict[str, float]:
    """Mean loss of a token, and perplexity, from losses and tokens of rows, `[rows, 2]`.

    >>> of_tokens([[2.0, 1.0], [0.0, 3.0]], None)
    {'loss': 0.5, 'perplexity': 1.648...}
    """
    del labels
    losses, tokens = np.asarray(rows, dtype=np.float64).sum(0)
    loss = float(losses / tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, MOST))}
