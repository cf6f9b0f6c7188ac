"""When plans are decided, and when frozen components are scored."""

from __future__ import annotations

from dataclasses import dataclass

from rgft.config import Config
from rgft.errors import warn


@dataclass(frozen=True, slots=True)
class Timetable:
    """What the settings say about the order of events, in optimizer steps.

    Attributes:
        config: The settings.
        uses_error: Whether the policy looks at the error map.
        revives: Whether a probing step can score frozen components.

    >>> times = Timetable(Config(every=2, warmup=3), uses_error=True, revives=True)
    >>> times.first, [steps for steps in range(9) if times.due(steps)]
    (3, [3, 5, 7])
    """

    config: Config
    uses_error: bool
    revives: bool

    @property
    def first(self) -> int:
        """Steps before the first decision."""
        return self.config.warmup or (self.config.every if self.uses_error else 0)

    @property
    def always_probes(self) -> bool:
        """Whether each step that can probe does."""
        every = self.config.every * self.config.probe_every
        return self.uses_error and self.revives and every == 1

    def due(self, steps: int) -> bool:
        """Whether a decision falls after `steps` steps."""
        since = steps - self.config.warmup
        return steps > 0 and since >= 0 and since % self.config.every == 0

    def decision(self, steps: int) -> int:
        """How many decisions came before the one that falls after `steps` steps."""
        return (steps - self.first) // self.config.every

    def probes(self, step: int) -> bool:
        """Whether step number `step` (from 1) also scores frozen components, if there are any."""
        every = self.config.probe_every
        if not (self.uses_error and self.revives and every > 0) or not self.due(step):
            return False
        return ((step - self.config.warmup) // self.config.every) % every == 0

    def idle(self, steps: int) -> bool:
        """Whether a run of that many steps ends before a plan of the policy's is in force."""
        return self.first > 0 and steps <= self.first - (not self.config.lag)

    def warn_if_idle(self, steps: int) -> None:
        """Say so if a run of that many steps is idle."""
        if not self.idle(steps):
            return
        warn(
            "no plan is decided in this run: the first decision comes after step "
            f"{self.first}, and the run has {steps}; lower every or warmup, or train longer"
        )
