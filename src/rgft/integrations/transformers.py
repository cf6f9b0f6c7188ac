"""Hugging Face Trainer: one callback.

trainer = Trainer(..., callbacks=[RGFTCallback(rgft.Config())])
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rgft.config import Config
from rgft.errors import InputError
from rgft.guide import Guide, Probe


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

    Attributes:
        guide: The guide, from the start of training on.
    """

    def __init__(self, config: Config | None = None, probe: Probe | None = None) -> None:
        self.config = config or Config()
        self.probe = probe
        self.guide: Guide | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind to the model and the optimizer; on resuming, take the saved state over."""
        del args, control
        if self.guide is not None:  # of a train() before this one, perhaps cut off
            self.guide.close()
        model: nn.Module = kwargs["model"]
        config = replace(self.config, total_steps=self.config.total_steps or state.max_steps)
        self.guide = Guide(model, kwargs["optimizer"], config, probe=self.probe)
        name = type(self).__name__
        saved = (state.stateful_callbacks or {}).get(name)
        if state.global_step and not saved:
            raise InputError(
                "the checkpoint has no state of residual-guided fine-tuning, so that an exact "
                "resume is impossible; start anew, or resume without the callback"
            )
        if saved and state.global_step:
            self.guide.load_state_dict(decode_state(saved["attributes"]["guide"]))
        state.stateful_callbacks[name] = self.state()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer. The error map stays readable."""
        del args, state, control, kwargs
        if self.guide is not None:
            self.guide.close()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json."""
        guide = {} if self.guide is None else {"guide": encode_state(self.guide.state_dict())}
        return {"args": {}, "attributes": guide}
