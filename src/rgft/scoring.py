"""From the gradients of each step to the error map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rgft.config import Config
from rgft.error_map import ErrorMap
from rgft.errors import warn
from rgft.execution.binding import Binding
from rgft.execution.measuring import Measuring, Scores
from rgft.processes import Processes
from rgft.signals import Signal

Probe = Callable[[int], Iterable[Tensor]]


class Scoring:
    """Keeps the error map.

    Args:
        binding: What of the model can be adapted.
        config: The settings.
        signal: The one that they name.
        generator: The signal's source of randomness.
        probe: Yields per-sample losses, for a signal that needs them; see `Guide`.
        processes: Those that hold parts of the parameters, if there are several.

    Attributes:
        error_map: The map.
        signal: As given.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a score depends on
        self,
        binding: Binding,
        config: Config,
        signal: Signal,
        generator: torch.Generator,
        probe: Probe | None,
        processes: Processes | None = None,
    ) -> None:
        self.signal = signal
        self._measuring = Measuring(binding, signal, generator, processes)
        self._probe, self._samples = probe, config.probe_samples
        self._warned = 0
        self.error_map = ErrorMap(
            binding.components,
            config.beta,
            bias_correction=config.bias_correction,
            device=binding.device,
            dtype=binding.dtype,
            history_rows=config.history_rows,
        )

    def before_step(self, inverse_scale: Tensor | None, valid: Tensor | None) -> None:
        """Look at the gradients that a step is about to use; see `watch_steps`."""
        self._take_in(self._measuring.before_step(inverse_scale), valid)

    def after_step(self) -> None:
        """Look at what a step has changed."""
        self._take_in(self._measuring.after_step(), None)

    def probe(self) -> None:
        """Score all components by per-sample losses, frozen ones included."""
        assert self._probe is not None
        with torch.enable_grad():
            self._take_in(self._measuring.from_samples(self._probe(self._samples)), None)

    def warn_if_skipped(self, skipped: int, steps: int) -> None:
        """Say so if more gradients were not finite than the last time; of `steps` steps."""
        if skipped <= self._warned:
            return
        self._warned = skipped
        warn(
            f"{skipped} of {steps} steps had a gradient that is not finite; "
            "they were left out of the error map"
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an error map."""
        self.error_map.load_state_dict(state)
        self._warned = int(state["skipped"])

    def _take_in(self, scores: Scores | None, valid: Tensor | None) -> None:
        if scores is not None:
            self.error_map.update(scores[0], scores[1], valid)
