"""The samples of a forward pass, read from the arguments of the model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from rgft.errors import warn
from rgft.execution.prefix_batch import Samples, read_samples
from rgft.structure.layers import unwrapped


class SampleReader:
    """Reads which samples a forward pass of `model` is about.

    Args:
        model: The model.
        key: Name of the argument with the ids; it is named in a warning, once, if a training batch
            comes without.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        self._model, self._key = model, key
        self._main = getattr(unwrapped(model), "main_input_name", None)
        self._positional = list(inspect.signature(model.forward).parameters)
        self._told = False

    def samples(self, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Samples | None:
        """The samples of the batch; None if it names none, or is of generation."""
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            return None
        if ids is None:
            self._tell()
            return None
        inputs = {**dict(zip(self._positional, args, strict=False)), **kwargs}
        return read_samples(ids, inputs, self._main)

    def _tell(self) -> None:
        if self._told or not (self._model.training and torch.is_grad_enabled()):
            return
        self._told = True
        warn(
            f"a training batch has no '{self._key}': the prefix cache spares it nothing; "
            "let the collator add one id a sample"
        )
