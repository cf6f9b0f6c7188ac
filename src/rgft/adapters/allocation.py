"""AdaLoRA's allocation of ranks, run over steps or over a budget.

PEFT prunes only if its caller says after every step which step it was; nothing happens otherwise,
and AdaLoRA is then LoRA of a larger rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rgft.config import Config
from rgft.errors import InputError
from rgft.policies import find_policy
from rgft.spending import Spending, parse_budget

FIRST, LAST = 0.15, 0.45  # shares of a run before ranks are pruned, and after (Zhang et al. 2023)
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what PEFT remembers of each weight


def check_allocation(config: Config, budget: str | None) -> None:
    """Refuse what ranks cannot be allocated under.

    Raises:
        InputError: Pairs may be frozen, or nobody knows how long the run is.
    """
    if config.frozen_below or find_policy(config).freezes:
        raise InputError(
            "AdaLoRA compares the importance of all pairs at each step, and frozen ones have none; "
            "take a policy that freezes nothing, without frozen_below"
        )
    if budget is not None and parse_budget(budget).auto:
        raise InputError(
            "AdaLoRA prunes ranks once over a run, whose length a budget that is auto does not "
            "know; give a share or a time, such as --budget 0.3"
        )


class RankAllocation(TrainerCallback):  # type: ignore[misc]
    """Prunes ranks by importance, after each optimizer step, while gradients are still there.

    All ranks train for the first 15% of the run; then their number falls by a cubic schedule; in
    the last 45% those that are left train on. Where there is a budget it is the clock.

    Args:
        model: An AdaLoRA model of PEFT.
        spending: What is spent of a budget; None to go by steps.
    """

    def __init__(self, model: nn.Module, spending: Spending | None = None) -> None:
        from peft import AdaLoraModel  # noqa: PLC0415 - slow to import

        self._model = model
        self._tuner = next(m for m in model.modules() if isinstance(m, AdaLoraModel))
        self._config = self._tuner.peft_config[self._tuner.trainable_adapter_name]
        self._spending = spending
        self._steps = 0
        self._settled = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the schedule, whose length is known by now."""
        del args, control, kwargs
        self.begin(state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune."""
        del args, state, control, kwargs
        self.step()

    def begin(self, total: int) -> None:
        """Set the schedule.

        Args:
            total: Steps of the run; with a budget, of its finest resolution.

        Raises:
            InputError: There is no room for one.
        """
        first, last = int(FIRST * total), int(LAST * total)
        if total - last < 2:
            raise InputError(
                f"the run has {total} steps, too few for AdaLoRA to choose ranks; train longer, or "
                "take --method lora"
            )
        self._config.total_step, self._config.tinit, self._config.tfinal = total, first, last

    @property
    def ranks(self) -> dict[str, int]:
        """How many ranks each triplet has at present, by the module it is beside."""
        pattern = self._config.rank_pattern
        if pattern is None:
            names = (n for n, _ in self._tuner.model.named_parameters() if ".lora_E." in n)
            return {name.partition(".lora_E")[0]: self._config.init_r for name in names}
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    def step(self) -> None:
        """Update importance and prune; after each optimizer step, before gradients go."""
        self._steps += 1
        total = self._config.total_step
        end = total - self._config.tfinal
        now = self._steps
        if self._spending is not None:
            # ranks cannot be chosen before their importance has been seen once
            now = min(round(self._spending.progress * total), total if self._steps > 1 else end - 1)
        if now < end:
            self._tuner.update_and_allocate(now)
        elif not self._settled:
            self._tuner.update_and_allocate(end)
            self._settled = True
        else:
            self._tuner.update_and_allocate(end + 1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs.

        Pairs are included, because PEFT saves them without what is pruned; and so are buffers, such
        as running statistics, which it does not save.
        """
        allocator = self._tuner.rankallocator
        return {
            "steps": self._steps,
            "settled": self._settled,
            "ranks": self._config.rank_pattern,
            "averages": {name: dict(getattr(allocator, name)) for name in AVERAGES},
            "weights": {n: value.detach().clone() for n, value in self._changing()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._steps, self._settled = int(state["steps"]), bool(state["settled"])
        self._config.rank_pattern = state["ranks"]
        device = next(self._model.parameters()).device
        for name, values in state["averages"].items():
            held = {n: value.to(device) for n, value in values.items()}
            setattr(self._tuner.rankallocator, name, held)
        with torch.no_grad():
            for name, value in self._changing():
                value.copy_(state["weights"][name])

    def _changing(self) -> list[tuple[str, Tensor]]:
        trained = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        return [*trained, *self._model.named_buffers()]
