"""A finished (or interrupted) run, as its folder records it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rgft.errors import InputError
from rgft.records import RUN_FILE, read_run
from rgft.report import amounts
from rgft.report.fields import Fields
from rgft.report.grid import ErrorGrid, load_grid

STATUSES = ("finished", "interrupted", "running")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality on the validation split at one moment of training.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the training data done.
        flops: Floating-point operations spent so far.
        seconds: Training time so far.
        metrics: Values by metric name.
    """

    step: int
    epoch: float
    flops: float
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Training loss of one logged step, and the scheduled learning rate."""

    step: int
    loss: float
    lr: float


@dataclass(frozen=True, slots=True)
class RecordedComponent:
    """A component of the run's model: its name, kind, depth and number of parameter elements."""

    name: str
    kind: str
    depth: int
    numel: int


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run left behind, checked. A number that was not measured is NaN.

    Attributes:
        status: "finished", or "interrupted" or "running" (also after a crash).
        method: Name of the method.
        task: Name of the task.
        model: Name or path of the model that was fine-tuned.
        seed: Seed of the run.
        lr: Learning rate before schedule and multipliers.
        epochs: Passes over the training data that were asked for.
        batch_size: Samples per step.
        budget: What was given, None without one.
        start: What a survey found and what was chosen by it, None without one.
        stages: What the stages of a budget that is auto came to, None without any.
        forgetting: What the model could do before and after, None where it was not measured.
        idle: Whether the run ended before the method's first decision.
        granularity: How the model was split into components.
        config: The method's settings.
        command: Shell command that repeats the run, in a new folder beside it.
        versions: Version by package name.
        hardware: What it ran on.
        started: Start, ISO 8601.
        seconds: Wall-clock seconds by phase: "train", "overhead", "evaluate".
        metric: Headline metric.
        metrics: Final values: split -> metric -> value.
        history: Evaluations during training.
        train_loss: Logged training losses.
        flops: "spent", "full" (what full fine-tuning would cost) and "share" = spent / full.
        peak_memory_bytes: Peak memory.
        parameters: "total" and "trainable" counts.
        updated_per_step: "mean", "min" and "max" parameters updated in a step.
        components: The partition of the model.
        error_map: The error map over steps; None if none was recorded.
    """

    status: str
    method: str
    task: str
    model: str
    seed: int
    lr: float
    epochs: float
    batch_size: float
    budget: str | None
    start: str | None
    stages: str | None
    forgetting: str | None
    idle: bool
    granularity: str | None
    config: Mapping[str, object]
    command: str
    versions: Mapping[str, object]
    hardware: Mapping[str, object]
    started: str
    seconds: Mapping[str, float]
    metric: str
    metrics: Mapping[str, Mapping[str, float]]
    history: tuple[Evaluation, ...]
    train_loss: tuple[LossPoint, ...]
    flops: Mapping[str, float]
    peak_memory_bytes: float
    parameters: Mapping[str, float]
    updated_per_step: Mapping[str, float]
    components: tuple[RecordedComponent, ...]
    error_map: ErrorGrid | None

    def headline(self, split: str) -> float | None:
        """The headline metric on `split`, None if that split was not evaluated."""
        return self.metrics.get(split, {}).get(self.metric)


def load_run(run_dir: Path) -> Run:
    """Reads `run.json` and `error_map.parquet` of a run folder.

    Args:
        run_dir: Folder that `rgft train` wrote.

    Returns:
        The run.

    Raises:
        InputError: A file is missing, damaged, or something else than a run's record.
    """
    fields = Fields(read_run(run_dir), str(run_dir / RUN_FILE))
    _check_status(fields)
    return _parse(fields, load_grid(run_dir / "error_map.parquet"), f"{run_dir.resolve()}-again")


def _parse(fields: Fields, error_map: ErrorGrid | None, again: str) -> Run:
    parameters = fields.inside("parameters")
    return Run(
        status=fields.text("status"),
        method=fields.text("method"),
        task=fields.text("task"),
        model=fields.text("model"),
        seed=fields.integer("seed"),
        lr=fields.number("lr"),
        epochs=fields.number("epochs"),
        batch_size=fields.number("batch_size"),
        budget=fields.optional_text("budget"),
        start=fields.optional_text("start"),
        stages=_stages(fields),
        forgetting=_forgetting(fields),
        idle=bool(fields.values.get("idle")),
        granularity=fields.optional_text("granularity"),
        config=fields.inside("config").values,
        command=f"{fields.text('command')} --output-dir {shlex.quote(again)}",
        versions=fields.inside("versions").values,
        hardware=fields.inside("hardware").values,
        started=fields.text("started"),
        seconds=_named_numbers(fields.inside("seconds"), "train", "overhead", "evaluate"),
        metric=fields.text("metric"),
        metrics=_metrics(fields.inside("metrics")),
        history=tuple(_evaluation(row) for row in fields.rows("history")),
        train_loss=tuple(_loss_point(row) for row in fields.rows("train_loss")),
        flops=_named_numbers(fields.inside("flops"), "spent", "full", "share"),
        peak_memory_bytes=fields.number("peak_memory_bytes"),
        parameters=_named_numbers(parameters, "total", "trainable"),
        updated_per_step=_named_numbers(
            parameters.inside("updated_per_step"), "mean", "min", "max"
        ),
        components=tuple(_component(row) for row in fields.rows("components")),
        error_map=error_map,
    )


def _stages(fields: Fields) -> str | None:
    if fields.values.get("budget_auto") is None:
        return None
    auto = fields.inside("budget_auto")
    rows = [
        {name: row.number(name) for name in ("share", "validation")} for row in auto.rows("stages")
    ]
    return amounts.stages({"stages": rows, "chosen": auto.values.get("chosen")})


def _forgetting(fields: Fields) -> str | None:
    if fields.values.get("forgetting") is None:
        return None
    found = fields.inside("forgetting")
    texts = {name: found.text(name) for name in ("of", "metric")}
    return amounts.forgetting(texts | {name: found.number(name) for name in ("before", "after")})


def _check_status(fields: Fields) -> None:
    status = fields.text("status")
    if status not in STATUSES:
        raise InputError(
            f'{fields.source}: "status" is {status!r} where one of {", ".join(STATUSES)} '
            "is needed; the file is damaged, train the run again"
        )
    if status != "finished" and "metrics" not in fields.values:
        raise InputError(
            f'{fields.source} has no results yet (its status is "{status}"); '
            "finish it with: rgft train --resume --output-dir FOLDER"
        )


def _named_numbers(fields: Fields, *names: str) -> dict[str, float]:
    return {name: fields.number(name) for name in names}


def _metrics(fields: Fields) -> dict[str, dict[str, float]]:
    return {split: fields.numbers(split) for split in fields.values}


def _evaluation(row: Fields) -> Evaluation:
    return Evaluation(
        step=row.integer("step"),
        epoch=row.number("epoch"),
        flops=row.number("flops"),
        seconds=row.number("seconds"),
        metrics=row.numbers("validation"),
    )


def _loss_point(row: Fields) -> LossPoint:
    return LossPoint(
        step=row.integer("step"),
        loss=row.number("loss"),
        lr=row.number("lr"),
    )


def _component(row: Fields) -> RecordedComponent:
    return RecordedComponent(
        name=row.text("name"),
        kind=row.text("kind"),
        depth=row.integer("depth"),
        numel=row.integer("numel"),
    )
