"""The residual ledger of a loop that others run: losses are read as the model is called."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgft.errors import TABLES_NEED, InputError, warn
from rgft.execution.parallel import many
from rgft.execution.prefix_cache import PrefixCache
from rgft.processes import Processes
from rgft.residuals import SAMPLE_IDS, Ledger
from rgft.sample_losses import sample_correct, sample_losses

PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label"}


class LossWatch:
    """Notes the loss of each training sample, by hooks on the model.

    A batch names its samples by `sample_ids`, their positions in the training data, which never
    reach the model's own code. What is noted is the loss that belongs to `logits` and `labels`,
    whatever the loop makes of it.

    Args:
        model: Called with `labels`, and returns `logits`, as models of transformers do.
        dataset: The training data.
        path: Where the ledger is to be written.
        cache: A prefix cache, which takes the ids before any hook sees them, and is asked.

    Attributes:
        ledger: What is known of the samples.

    Raises:
        InputError: The samples have no numbers, or there is nothing to write tables with.
    """

    def __init__(
        self, model: nn.Module, dataset: Any, path: str | Path, cache: PrefixCache | None = None
    ) -> None:
        if not (find_spec("pandas") and find_spec("pyarrow")):
            raise InputError(TABLES_NEED)  # now, and not when training is over
        self.ledger = Ledger(_samples(dataset))
        self._first = True
        if many():
            processes = Processes()
            self.ledger.share(processes)
            self._first = processes.rank == 0
        self._path, self._cache = Path(path), cache
        self._ids: Any = None
        self._seen = False
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def check_seen(self) -> None:
        """Refuse a loop whose batches do not say which samples they hold. After the first step.

        Raises:
            InputError: No sample was seen.
        """
        if not self._seen:
            raise InputError(
                f"residuals: the samples have {SAMPLE_IDS}, but the model was called without; let "
                "the collator hand them on as a tensor (the model itself does not get to see them)"
            )

    def resume(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on from `state_dict`; None where a checkpoint has none."""
        if state is not None:
            self.ledger.load_state_dict(state)
            return
        warn(f"the checkpoint at step {step} was written without residuals; the ledger begins anew")

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def write(self) -> None:
        """Write the table, in one process."""
        if self._first:
            self.ledger.write(self._path)

    def _before(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        given = dict(kwargs)
        ids = given.pop(SAMPLE_IDS, None) if self._cache is None else self._cache.ids
        self._ids = ids if module.training and torch.is_grad_enabled() else None
        return args, given

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        del args
        ids, self._ids = self._ids, None
        if ids is None:
            return
        labels, logits = kwargs.get("labels"), getattr(output, "logits", None)
        if labels is None or logits is None:
            missing = "labels" if labels is None else "logits"
            raise InputError(
                f"residuals: a sample's loss needs labels and logits, and there are no {missing} "
                "(with label smoothing or a loss of its own a Trainer keeps the labels to itself); "
                "drop residuals, or call Ledger.update in a loop of your own"
            )
        self._seen = True
        kind, logits = residual_kind(module, logits, labels), logits.detach()
        numbers = torch.as_tensor(ids, device=logits.device)
        with torch.no_grad():
            losses = sample_losses(logits, labels, kind)
            self.ledger.update(numbers, losses, sample_correct(logits, labels, kind))


def residual_kind(model: nn.Module, logits: Tensor, labels: Tensor) -> str:
    """Which of the kinds in `rgft.sample_losses` a model's loss is of."""
    base: Any = getattr(model, "get_base_model", lambda: model)  # of PEFT
    inner = base()
    problem = getattr(getattr(inner, "config", None), "problem_type", None)
    if problem in PROBLEMS:
        return PROBLEMS[problem]
    name = type(inner).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if labels.is_floating_point():
        same = labels.ndim > 1 and labels.shape == logits.shape and problem is None
        return "multi-label" if same and labels.shape[1] > 1 else "regression"
    return "classification"


def _samples(dataset: Any) -> int:
    """How many there are, once it is clear that they have numbers.

    Raises:
        InputError: They have none.
    """
    try:
        count, first = len(dataset), dataset[0]
    except (TypeError, KeyError, IndexError, NotImplementedError):
        raise InputError(
            f"residuals: the training data ({type(dataset).__name__}) cannot be counted and looked "
            f"up by position; give a data set that can, with the positions as {SAMPLE_IDS}"
        ) from None
    if not isinstance(first, Mapping) or SAMPLE_IDS not in first:
        raise InputError(
            f"residuals: a training sample has no {SAMPLE_IDS}; give each its position, 0 to "
            f"{count - 1}, under that name (and the Trainer remove_unused_columns=False)"
        )
    return count
