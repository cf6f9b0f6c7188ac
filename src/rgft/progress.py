"""What a run shows while it goes on: what it waits for, bars, and one line per evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rgft.launch import leads
from rgft.spending import Spending


class Quiet:
    """Silences the bars and remarks of transformers and the hub's client for a while."""

    def __enter__(self) -> None:
        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        self._hub = hub_logging.get_verbosity()
        logging.set_verbosity_error()
        hub_logging.set_verbosity(ERROR)
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        logging.set_verbosity(self._verbosity)
        hub_logging.set_verbosity(self._hub)
        if self._bars:
            logging.enable_progress_bar()


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show `text` on a terminal's standard error until the block ends."""
    if not (leads() and sys.stderr.isatty()):
        yield
        return
    with Console(stderr=True).status(text):
        yield


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar on a terminal's standard error; a line per evaluation on standard output.

    Args:
        metric: Headline metric, shown with the losses.
        spending: Of a run that ends with its budget; the bar is then one of percents of it.
    """

    def __init__(self, metric: str, spending: Spending | None = None) -> None:
        self._metric, self._spending = metric, spending
        self._loss = ""
        self._bar: Any = None
        self._inner: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close_inner()
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        del args, control, kwargs
        total, unit = (state.max_steps, "step") if self._spending is None else (100, "%")
        self._bar = bar("training", total, unit, initial=self._done(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step on."""
        del args, control, kwargs
        self._bar.update(self._done(state) - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the training loss in the bar."""
        del args, state, control
        if "loss" in (kwargs.get("logs") or {}):
            self._loss = f"{float(kwargs['logs']['loss']):.4g}"
            self._bar.set_postfix_str(f"loss {self._loss}", refresh=False)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show a bar of its own where evaluating takes more than a second."""
        del args, state, control
        if self._inner is None:
            self._inner = bar("evaluating", len(kwargs["eval_dataloader"]), "step", delay=1)
        self._inner.update(1)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove that bar."""
        del args, state, control, kwargs
        self._close_inner()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove that bar and write a line."""
        del args, control
        self._close_inner()
        measured = kwargs["metrics"]
        names = dict.fromkeys(("loss", self._metric))
        shown = [f"{name} {measured[f'eval_{name}']:.4g}" for name in names]
        width = len(str(state.max_steps))
        passed = f"step {state.global_step:>{width}} of {state.max_steps}"
        if self._spending is not None:
            passed = f"step {state.global_step:>{width}}, {self._done(state):3}% of the budget"
        tqdm.write(
            f"{passed}: validation {', '.join(shown)}"
            + (f"; training loss {self._loss}" if self._loss else "")
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        del args, state, control, kwargs
        self._bar.close()

    def _done(self, state: TrainerState) -> int:
        """Steps, or percents of the budget."""
        if self._spending is None:
            return int(state.global_step)
        return round(100 * self._spending.progress)

    def _close_inner(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def bar(text: str, total: int, unit: str, **settings: Any) -> Any:
    """Shown on a terminal only, and gone when it is closed."""
    return tqdm(
        total=total,
        desc=text,
        unit=unit,
        leave=False,
        disable=None if leads() else True,
        dynamic_ncols=True,
        **settings,
    )
