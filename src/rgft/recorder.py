"""A Trainer callback that notes what a run costs and how its quality grows."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rgft.costs import Counts, FlopMeter
from rgft.errors import InputError
from rgft.integrations.transformers import RGFTCallback
from rgft.processes import Processes
from rgft.residuals import Ledger
from rgft.spending import Spending

Totals = dict[str, Any]


def strip(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The Trainer's metrics under their own names, without its timings."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    return {k: float(v) for k, v in named.items() if k not in timings}


def diverged(what: str, value: float, step: int) -> InputError:
    """The error to raise when `what` is not finite."""
    return InputError(
        f"the {what} is {value} at step {step}: training diverged; "
        "give a lower --lr, or look for broken values in the data"
    )


class RunRecorder(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Counts FLOPs, seconds and updated parameters; they travel in the Trainer's checkpoints.

    Args:
        meter: Counts FLOPs.
        guidance: The callback that guides the run.
        ledger: Counts the visits.
        processes: Those that train together; what is noted is that of all.

    Attributes:
        totals: Sums over the whole run, over interruptions too.
        history: Validation metrics over steps.
        train_loss: Logged training losses over steps.
    """

    def __init__(
        self,
        meter: FlopMeter,
        guidance: RGFTCallback,
        ledger: Ledger,
        processes: Processes | None = None,
    ) -> None:
        self.meter, self._processes = meter, processes
        if processes is not None:
            meter.join(processes)
        self._ledger = ledger
        self._guidance = guidance
        self.totals: Totals = {
            "train": 0.0,
            "processor": 0.0,
            "overhead": 0.0,
            "evaluate": 0.0,
            "updated": [0, 0, 0],
            "steps": 0,
        }
        self.history: list[dict[str, Any]] = []
        self.train_loss: list[dict[str, Any]] = []
        self._loss: Tensor | float = 0.0
        self._losses = 0
        self._started = self._processor = 0.0
        self._guided = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the sums of a run that is resumed."""
        del args, control, kwargs
        name = type(self).__name__
        saved = (state.stateful_callbacks or {}).get(name)
        if state.global_step and saved:
            attributes = saved["attributes"]
            self.totals, self.history = attributes["totals"], attributes["history"]
            self.train_loss = attributes["train_loss"]
            self._loss, self._losses = attributes["loss"]
            batches = self.meter.totals.batches  # a budget has loaded them
            self.meter.load(Counts(attributes["spent"], attributes["full"], batches))
        self._settle()
        state.stateful_callbacks[name] = self.state()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; count what this step will update."""
        del args, state, control, kwargs
        guide = self._guidance.guide
        assert guide is not None
        on = [trained or guide.trying for trained in guide.plan.trained]
        updated = sum(p.weight.numel() for p in guide.binding.pieces if on[p.component])
        total, least, most = self.totals["updated"]
        least = min(least, updated) if self.totals["steps"] else updated
        self.totals["updated"] = [total + updated, least, max(most, updated)]
        self.totals["steps"] += 1
        self._guided = guide.seconds
        self._started, self._processor = time.perf_counter(), time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        del args, state, control, kwargs
        assert self._guidance.guide is not None
        self._settle()
        self.totals["train"] += time.perf_counter() - self._started
        self.totals["processor"] += time.process_time() - self._processor
        self.totals["overhead"] += self._guidance.guide.seconds - self._guided

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the training loss.

        Raises:
            InputError: It is not finite.
        """
        del args, control
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        loss, rate = self._mean_loss(state.global_step), float(logs["learning_rate"])
        self._loss, self._losses = 0.0, 0
        self.train_loss.append(
            {"step": state.global_step, "loss": loss, "lr": rate, "flops": self.meter.totals.spent}
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the losses since the last log.

        Raises:
            InputError: They are not finite.
        """
        del args, control, kwargs
        self._mean_loss(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the validation metrics."""
        del args, control
        self.totals["evaluate"] += kwargs["metrics"].get("eval_runtime", 0.0)
        self.history.append(
            {
                "step": state.global_step,
                "epoch": int(self._ledger.visits.sum()) / len(self._ledger),
                "flops": self.meter.totals.spent,
                "seconds": self.totals["train"],
                "validation": strip(kwargs["metrics"], "eval_"),
            }
        )

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a step, a scalar, without waiting for the device."""
        loss = loss.detach().float()
        if self._processes is not None:
            loss = self._processes.gathered(loss).mean()
        self._loss = loss + self._loss
        self._losses += 1

    @contextmanager
    def uncounted(self, idle: bool) -> Iterator[None]:
        """Whether what runs in this block is a row that only keeps a process in step."""
        before = self.meter.spent, self.meter.full, self.meter.batches
        yield
        if idle:
            self.meter.spent, self.meter.full, self.meter.batches = before

    def _settle(self) -> None:
        """Sum up the FLOPs of all processes, where a budget does not do so at each step."""
        if self._guidance.spending is None:
            self.meter.settle()

    def components(self) -> list[dict[str, Any]]:
        """The adapted components with their adaptable parameter elements."""
        assert self._guidance.guide is not None
        binding = self._guidance.guide.binding
        rows = zip(binding.components, binding.numel().tolist(), strict=True)
        return [
            {"name": c.name, "kind": c.kind, "depth": c.depth, "numel": int(n)} for c, n in rows
        ]

    def updated_per_step(self) -> dict[str, float]:
        """Mean, least and most parameter elements that a step updated."""
        total, least, most = self.totals["updated"]
        return {"mean": total / max(self.totals["steps"], 1), "min": least, "max": most}

    def _mean_loss(self, step: int) -> float:
        loss = float(self._loss) / max(self._losses, 1)
        if not math.isfinite(loss):
            raise diverged("training loss", loss, step)
        return loss

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json."""
        attributes = {
            "totals": self.totals,
            "history": self.history,
            "train_loss": self.train_loss,
            "loss": [float(self._loss), self._losses],
            "spent": self.meter.totals.spent,
            "full": self.meter.totals.full,
        }
        return {"args": {}, "attributes": attributes}


class Pace(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves at equal shares of a budget, and at its end.

    Args:
        spending: What has been spent.
        stages: How many evaluations there are.
    """

    def __init__(self, spending: Spending, stages: int) -> None:
        self._spending, self._stages = spending, stages
        self._before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run has passed what it had passed."""
        del args, state, control, kwargs
        self._before = self._spending.progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation and a checkpoint where a stage ends."""
        del args, state, kwargs
        passed = self._spending.progress
        stage_ends = int(passed * self._stages) > int(self._before * self._stages)
        self._before = passed
        if stage_ends or control.should_training_stop:
            control.should_evaluate = control.should_save = True


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C (or a polite kill) lets the step in progress end, saves, and stops.

    Args:
        processes: Those that stop together, once one of them was asked to.

    Attributes:
        stopped: Whether that has happened.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.stopped = False
        self._processes = processes
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if asked to."""
        del args, state, kwargs
        if self._processes is not None:
            self.stopped = self._processes.totals([int(self.stopped)])[0] > 0
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def _stop(self, number: int, frame: object) -> None:
        del number, frame
        # the second time is meant; of several processes a launcher ends those that take long
        if self.stopped and self._processes is None:
            raise KeyboardInterrupt
        self.stopped = True
