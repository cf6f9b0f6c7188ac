"""A budget: how much compute a run may spend, how far it has come, and when it ends."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rgft.costs import Counts, FlopMeter
from rgft.errors import InputError, warn
from rgft.processes import Processes
from rgft.stages import STAGES, Stage, Yardstick, best_stage, worth_going_on

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
ALLOWED = (
    "a share of full fine-tuning in (0, 1], such as 0.3, a time, such as 90s, 20min or 2h, or auto"
)
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend: a share or a time.

    Attributes:
        share: Of the FLOPs of full fine-tuning on the same data and epochs, in (0, 1].
        seconds: On the wall, from when spending begins; evaluations during training count.
        auto: The share is the most that may be spent; the run goes through stages
            (`rgft.stages`) and ends with the one that buys too little.
    """

    share: float | None = None
    seconds: float | None = None
    auto: bool = False

    def __str__(self) -> str:
        """As it is given."""
        if self.auto:
            return AUTO
        return f"{self.share:g}" if self.seconds is None else f"{self.seconds:g}s"


def parse_budget(text: str) -> Budget:
    """The budget that a text names.

    Raises:
        InputError: It names none.

    >>> parse_budget("0.3").share, parse_budget("20min").seconds
    (0.3, 1200.0)
    >>> parse_budget("auto")
    Budget(share=1.0, seconds=None, auto=True)
    """
    if text.strip() == AUTO:
        return Budget(share=STAGES[-1], auto=True)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(s|min|h)?\s*", text)
    if match is None:
        raise InputError(f"budget is {text!r}; allowed: {ALLOWED}")
    number, unit = float(match[1]), match[2]
    if number <= 0 or (unit is None and number > 1):
        raise InputError(f"budget is {text!r}; allowed: {ALLOWED}")
    return Budget(seconds=number * SECONDS[unit]) if unit else Budget(share=number)


class Spending:
    r"""What has been spent of a budget. It paces the learning rate and says when the run ends.

    The learning-rate schedule is a function of the share of the *budget* that is spent, not of
    steps: a plan whose steps are cheap gets more of them. The run ends with the step after which
    spending is nearest to the budget.

    A budget that is `auto` is spent in stages. Where `stage_ended` is true, evaluate, and give
    `close_stage` the result; the schedule runs over each stage anew.

    Args:
        meter: Counts the FLOPs of the model that trains.
        budget: What may be spent.
        full: FLOPs of full fine-tuning on the same data and epochs, where they are known.
        batches: Forward passes of full fine-tuning, where `full` is not known: it is then their
            number times the mean cost of those seen so far.
        yardstick: What the stages of a budget that is `auto` are judged by.
        clock: Seconds, for a budget of time.

    Attributes:
        seconds: Time spent in earlier parts of a run that is resumed.
        stages: Those of a budget that is `auto`, as far as they have been closed.

    Raises:
        InputError: A share of something unknown; stages with nothing to judge them by.

    >>> from torch import nn, ones
    >>> model = nn.Linear(2, 1)
    >>> spending = Spending(FlopMeter(model), Budget(share=0.5), batches=4)
    >>> while not spending.finished:
    ...     _ = model(ones(1, 2)); spending.step()
    >>> spending.progress
    1.0
    """

    def __init__(  # noqa: PLR0913 - all but two have defaults
        self,
        meter: FlopMeter,
        budget: Budget,
        *,
        full: int | None = None,
        batches: int | None = None,
        yardstick: Yardstick | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if budget.share is not None and full is None and batches is None:
            raise InputError("a share of full fine-tuning needs its cost: give full= or batches=")
        if budget.auto and yardstick is None:
            raise InputError(
                "a budget that is auto judges by validation: give yardstick=, such as "
                "Yardstick('accuracy', rows=500, chance=0.5)"
            )
        self.meter, self.budget = meter, budget
        self.seconds = 0.0
        self.stages: list[Stage] = []
        self._yardstick, self._ends = yardstick, STAGES if budget.auto else (1.0,)
        # the stage that runs, what was spent before it, whether it was the last
        self._open, self._began, self._over = 0, 0.0, False
        self._full, self._batches, self._clock = full, batches, clock
        self._started = clock()
        self._before = self._last = 0.0
        self._processes: Processes | None = None
        self._elapsed = 0.0  # on the clock of the first of them

    @property
    def full(self) -> float:
        """FLOPs of full fine-tuning: known, or estimated from the batches so far."""
        if self._full is not None:
            return float(self._full)
        assert self._batches is not None
        totals = self.meter.totals
        processes = 1 if self._processes is None else self._processes.size
        return totals.full / max(totals.batches, 1) * self._batches * processes

    @property
    def spent(self) -> float:
        """FLOPs, or seconds, so far."""
        if self.budget.seconds is not None:
            return self._elapsed if self._processes else self._seconds
        return float(self.meter.totals.spent)

    @property
    def _seconds(self) -> float:
        return self.seconds + self._clock() - self._started

    @property
    def limit(self) -> float:
        """FLOPs, or seconds, that may be spent."""
        if self.budget.seconds is not None:
            return self.budget.seconds
        assert self.budget.share is not None
        return self.budget.share * self.full

    @property
    def flops_limit(self) -> float:
        """FLOPs that may be spent; those of full fine-tuning where the limit is a time.

        Of a budget that is `auto`, those of the first stage: nothing more is certain.
        """
        return self.full * self._ends[0] * (1.0 if self.budget.share is None else self.budget.share)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        limit = self.limit
        return min(1.0, self.spent / limit) if limit else 0.0

    @property
    def stage_progress(self) -> float:
        """Share of the present stage that is spent, in [0, 1]; without stages, of the budget."""
        if not self.limit:
            return 0.0
        length = self._ends[self._open] * self.limit - self._began
        return min(1.0, (self.spent - self._began) / length) if length > 0 else 1.0

    @property
    def stage_ended(self) -> bool:
        """Whether another step like the last would end further from the stage's end than this."""
        return bool(self.limit) and self._passed(self._open)

    @property
    def finished(self) -> bool:
        """Whether all is spent, or the last stage that was worth running is closed."""
        return self._over if self.budget.auto else self.stage_ended

    @property
    def best(self) -> int | None:
        """Position of the best of the `stages`, the latest among equals; None before the first."""
        if self._yardstick is None or not self.stages:
            return None
        return best_stage([stage.validation for stage in self.stages], self._yardstick)

    def close_stage(self, validation: float) -> bool:
        """Judge the stage that has ended; whether another one has begun.

        Args:
            validation: The validation metric of the model as it is now; with several processes
                that of the first counts.

        Raises:
            InputError: None has ended.
        """
        if not self.budget.auto or self._yardstick is None or self.finished or not self.stage_ended:
            raise InputError(
                "no stage has ended: close_stage is for a budget that is auto, where stage_ended "
                "is true, once a stage"
            )
        if self._processes is not None:
            value = torch.tensor(validation, dtype=torch.float64)
            validation = float(self._processes.of_first(value))
        self.stages.append(Stage(self.spent / self.full, float(validation)))
        following = [i for i in range(self._open + 1, len(self._ends)) if not self._passed(i)]
        values = [stage.validation for stage in self.stages]
        self._over = not following or not worth_going_on(values, self._yardstick)
        if not self._over:
            self._open, self._began = following[0], self.spent
        return not self._over

    def step(self) -> None:
        """Note that an optimizer step has ended. Every process has to.

        Raises:
            InputError: A share is to be spent, and nothing was counted in the step.
        """
        self.settle()
        spent = self.spent
        if self.budget.share is not None and spent == self._before:
            raise InputError(
                "nothing was counted in this step, and so the budget would never be spent: forward "
                "passes count in training mode alone; call model.train() before the loop"
            )
        self._last, self._before = spent - self._before, spent

    def share(self, processes: Processes) -> None:
        """The budget is one of several processes; what all did alike so far counts once."""
        self._processes = processes
        self.meter.join(processes)
        self.settle()

    def settle(self) -> None:
        """Sum up what the processes have spent, so that all go by the same, and by one clock."""
        self.meter.settle()
        if self._processes is not None:
            seconds = torch.tensor(self._seconds, dtype=torch.float64)
            self._elapsed = float(self._processes.of_first(seconds))

    def paced(self, schedule: Callable[[int], float], steps: int) -> Callable[[int], float]:
        """A schedule over `steps` steps as one over the budget, whatever step it is asked for.

        Where the budget has stages, it runs over each of them.
        """
        return lambda step: schedule(min(steps, round(self.stage_progress * steps)))

    def _passed(self, stage: int) -> bool:
        """Whether spending is nearer to the end of a stage than another step would bring it."""
        return self.spent + self._last / 2 >= self._ends[stage] * self.limit

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            **self.meter.totals._asdict(),
            "budget": str(self.budget),
            "seconds": self._seconds,
            "last": [self._before, self._last],
            "stages": [[stage.share, stage.validation] for stage in self.stages],
            "stage": [self._open, self._began, self._over],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, with a warning if the budget is another."""
        before = state.get("budget", str(self.budget))
        if before != str(self.budget):
            warn(
                f"the budget is {self.budget} and was {before} when this state was saved; what was "
                "spent counts, and the run is not the one that was stopped"
            )
        self.meter.load(Counts(*(int(state[name]) for name in Counts._fields)))
        self.seconds, self._started = float(state["seconds"]), self._clock()
        self._before, self._last = (float(x) for x in state["last"])
        self.stages = [Stage(*map(float, stage)) for stage in state["stages"]]
        self._open, self._began, self._over = state["stage"]
        self.settle()
