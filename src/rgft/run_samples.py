"""Which samples a run trains on, how often it visits each, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rgft.batches import Example
from rgft.budgeting import MOST_VISITS
from rgft.errors import InputError, warn
from rgft.inputs import Inputs
from rgft.loss_percentiles import LossPercentiles
from rgft.methods import Method
from rgft.residuals import Ledger
from rgft.run_trainer import Sampling
from rgft.sampling import class_weights
from rgft.spec import RunSpec, without_budget
from rgft.spending import Spending
from rgft.tasks import TaskData, load_folder, load_pairs, load_task
from rgft.tasks.splitting import fewer_evaluation_rows, fewer_train_rows
from rgft.visits import VisitSampler

BUCKET = 16  # batches whose texts are sorted by length among each other
FULL_PASS = 0.125  # of the run, at its end, where a method skips samples (Qin et al. 2024)
BALANCED = ("matthews_correlation", "f1_macro")  # metrics in which every class counts alike
BALANCE = 0.5


def load_data(spec: RunSpec) -> TaskData:
    """The task or the user's own data, with as many rows as were asked for."""
    task = _load_data(spec)
    if spec.max_train_rows is not None:
        task = fewer_train_rows(task, spec.max_train_rows)
    if spec.max_evaluation_rows is not None:
        task = fewer_evaluation_rows(task, spec.max_evaluation_rows)
    return task


def _load_data(spec: RunSpec) -> TaskData:
    """The task or the user's own data, whole."""
    folder = None if spec.data is None else Path(spec.data)
    if spec.task is not None:
        if spec.text_columns or spec.label_column or spec.target_column:
            raise InputError(
                "--text-columns, --label-column and --target-column go with --data alone, not with "
                "--task"
            )
        return load_task(spec.task, folder)
    assert folder is not None
    if spec.target_column is not None:
        return load_pairs(folder, spec.target_column, spec.text_columns)
    return load_folder(folder, spec.text_columns, spec.label_column)


def check_skipping(spec: RunSpec, method: Method) -> None:
    """Refuse to leave samples out where it has no effect, or a wrong one.

    Raises:
        InputError: It is so.
    """
    if method.skip and spec.budget is None:
        raise without_budget(f"the method '{spec.method}' leaves samples out, which")
    if spec.skip and method.percentile_power is not None:
        raise InputError(
            f"skip is {spec.skip}, but the method '{spec.method}' chooses samples itself, from "
            "whole batches; drop it"
        )


def sampling(  # noqa: PLR0913 - what it is made of
    spec: RunSpec,
    task: TaskData,
    method: Method,
    *,
    rows: Sequence[Example],
    inputs: Inputs,
    batch_size: int,
    spending: Spending | None,
) -> Sampling:
    """How the training rows of a run are drawn and weighed.

    Raises:
        InputError: Classes are to be weighed, and there are none.
    """
    ledger = Ledger(len(rows))
    visits = None
    if spending is not None:
        lengths = [sum(inputs.lengths(row)) for row in rows]
        visits = _visits(spec, method, ledger, lengths, batch_size, spending)
    power = method.percentile_power
    hard = None if power is None else LossPercentiles(power, spec.seed)
    return Sampling(ledger, visits, _balance(spec, task, method, rows), hard)


def _visits(  # noqa: PLR0913, PLR0917 - what it is made of
    spec: RunSpec,
    method: Method,
    ledger: Ledger,
    lengths: Sequence[int],
    batch_size: int,
    spending: Spending,
) -> VisitSampler:
    """The samples of a run that ends with its budget."""
    grouped = spec.group_by_length
    if grouped is None:
        grouped = method.surveyed is not None
    epochs = math.ceil(spec.epochs * MOST_VISITS)
    return VisitSampler(
        ledger,
        batch_size=batch_size,
        epochs=epochs,
        skip=method.skip if spec.skip is None else spec.skip,
        full_pass=FULL_PASS if method.skip else 0.0,
        over=lambda: spending.stage_progress,
        lengths=lengths if grouped else None,
        bucket=BUCKET,
        seed=spec.seed,
    )


def _balance(
    spec: RunSpec, task: TaskData, method: Method, rows: Sequence[Example]
) -> Tensor | None:
    """Weights of the classes; None for all alike.

    Raises:
        InputError: They are asked for, and there are no classes.
    """
    exponent = spec.balance
    if exponent is None and spec.budget is not None and method.surveyed is not None:
        exponent = BALANCE if task.metric in BALANCED else 0.0
    if not exponent:
        return None
    if task.kind != "classification":
        what = "numbers" if task.kind == "regression" else "texts"
        raise InputError(f"balance is {exponent}, but the labels are {what}, not classes; drop it")
    weights = class_weights(torch.tensor([row["labels"] for row in rows]), exponent)
    if spec.balance and torch.allclose(weights, torch.ones_like(weights)):
        warn(f"balance is {spec.balance} and has no effect: all classes are equally frequent")
    return weights
