"""What to run, and its two written forms: a record's arguments and a command line."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rgft.errors import InputError
from rgft.rules import POSITIVE, Rule, check, number, optional, whole
from rgft.spending import parse_budget

PRECISIONS = ("float32", "bfloat16")
MAX_LENGTH = 128
MAX_TARGET_LENGTH, BEAMS, WRITTEN_ROWS = 64, 1, 128  # of texts to write, where not given
CACHES = ("float32", "bfloat16", "int8", "off")
PLACE: Rule = (lambda v: isinstance(v, str) and bool(v.strip()), "a name or a folder")
RULES: dict[str, Rule] = {
    "model": PLACE,
    "data": optional(PLACE),
    "epochs": POSITIVE,
    "lr": optional(POSITIVE),
    "seed": (lambda v: whole(0)[0](v) and v < 2**32, "a whole number, 0 to 2^32 - 1"),
    "batch_size": optional(whole(1)),
    "adam_beta2": optional((lambda v: number(v) and 0 <= v < 1, "in [0, 1)")),
    "max_length": whole(4),
    "image_size": optional(whole(8)),
    "max_target_length": optional(whole(1)),
    "beams": optional(whole(1)),
    "written_rows": optional(whole(1)),
    "max_train_rows": optional(whole(1)),
    "max_evaluation_rows": optional(whole(1)),
    "evaluations": optional(whole(1)),
    "keep_layers": optional(whole(1)),
    "skip": optional((lambda v: number(v) and 0 <= v < 1, "in [0, 1)")),
    "balance": optional((lambda v: number(v) and 0 <= v <= 1, "in [0, 1]")),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "prefix_cache": optional((lambda v: v in CACHES, f"one of {', '.join(CACHES)}")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What to run.

    Attributes:
        model: Folder, hub id, or packaged name (`rgft.models.PACKAGED`).
        task: Name of a task; None for the user's own data.
        data: Folder of the task, or of the user's own data.
        text_columns: Text columns of the user's own data; detected by default.
        label_column: Label column of the user's own data; detected by default.
        target_column: Column of the user's own data with texts that a model is to write, in place
            of labels.
        method: A name in `rgft.METHODS`.
        epochs: Passes over the training data.
        lr: Peak learning rate; None for the method's own, scaled to the model (`rgft.rate_scale`).
        seed: Of the head, the order of the data, dropout and the method.
        budget: Share of the FLOPs of full fine-tuning ("0.3"), or a time ("20min"),
            or "auto"; None for none.
        batch_size: Samples per optimizer step; None for the method's own (32 without a budget).
        adam_beta2: Smoothing of squared gradients in AdamW; None for the method's own (0.999
            without a budget).
        max_length: Tokens a text is cut at.
        image_size: Pixels a side that images are scaled to; None for the model's own.
        prompt: Where texts are written: what the model reads, with text columns in braces; None for
            the task's.
        max_target_length: Tokens that these texts are cut at, and the most that are written; None
            for `MAX_TARGET_LENGTH`.
        beams: Width of the beam search by which they are written; None for `BEAMS`.
        written_rows: Most rows of a split for which texts are written at an evaluation; None for
            `WRITTEN_ROWS`.
        max_train_rows: Most rows of the training split that are used; None for all. Which ones does
            not depend on the seed.
        max_evaluation_rows: Most rows of each other split that are used; None for all.
        granularity: How components are cut; None for the method's own.
        settings: Fields of `Config` that are to differ from the method's own, and lora_rank.
        evaluations: Evaluations of the validation split, and checkpoints, per epoch (about); None
            for 4, or fewer on small data (`rgft.training_arguments.evaluations_per_epoch`).
        keep_layers: The first so many layers are kept, those after them dropped; None for what the
            method chooses (all of them without a budget).
        skip: With a budget: share of the well predicted samples that an epoch leaves out; None for
            the method's own (0 without one).
        group_by_length: With a budget: whether batches hold texts of like length; None for the
            method's own.
        balance: Exponent b of class weights (1 / frequency)^b in the loss, in [0, 1]; None for the
            method's own (0 without a budget).
        dropout: Whether the model's dropout acts in training; None for the method's own (it does
            without a budget).
        precision: Of matrix products: "float32", or "bfloat16" (weights stay in float32).
        prefix_cache: Format in which outputs of the frozen deepest layers are kept, or "off"; None
            for the method's own.
        forgetting: Whether an ability of the pre-trained model is measured before and after
            (`rgft.forgetting`).
        extend: Python files with methods and tasks of the user's own.
    """

    model: str = "minilm"
    task: str | None = None
    data: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    target_column: str | None = None
    method: str = "rgft"
    epochs: float = 3.0
    lr: float | None = None
    seed: int = 0
    budget: str | None = None
    batch_size: int | None = None
    adam_beta2: float | None = None
    max_length: int = MAX_LENGTH
    image_size: int | None = None
    prompt: str | None = None
    max_target_length: int | None = None
    beams: int | None = None
    written_rows: int | None = None
    max_train_rows: int | None = None
    max_evaluation_rows: int | None = None
    granularity: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int | None = None
    keep_layers: int | None = None
    skip: float | None = None
    group_by_length: bool | None = None
    balance: float | None = None
    dropout: bool | None = None
    precision: str = "float32"
    prefix_cache: str | None = None
    forgetting: bool | None = None
    extend: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check(self, RULES)
        if self.budget is not None:
            parse_budget(self.budget)
        elif self.skip or self.group_by_length is not None:
            name = "skip" if self.skip else "group_by_length"
            raise without_budget(name)
        if self.target_column is not None and self.label_column is not None:
            raise InputError(
                "target_column and label_column exclude each other: a model writes texts or learns "
                "labels; give one"
            )
        if self.task is None and self.data is None:
            raise InputError("no data: give --task NAME (see `rgft data`) or --data DIR")


def without_budget(what: str) -> InputError:
    """The error to raise where `what` is asked for, and no budget is given."""
    return InputError(
        f"{what} takes effect with a budget alone: give --budget too (1.0 for what full "
        "fine-tuning costs)"
    )


def arguments(spec: RunSpec) -> dict[str, Any]:
    """`spec` as it stands in a record: what JSON can hold, infinity as "inf".

    >>> arguments(RunSpec(task="trec", settings={"p": math.inf}))["settings"]
    {'p': 'inf'}
    """
    values = {option.name: getattr(spec, option.name) for option in fields(RunSpec)}
    values["settings"] = {k: "inf" if v == math.inf else v for k, v in spec.settings.items()}
    try:
        return dict(json.loads(json.dumps(values)))
    except TypeError as error:
        raise InputError(f"a setting cannot be written to a record: {error}") from error


def from_arguments(values: Mapping[str, Any], source: str, **changed: Any) -> RunSpec:
    """The spec that `arguments` was given, with what has `changed`; `source` is for messages.

    Raises:
        InputError: It is not one.
    """
    try:
        columns = values["text_columns"]
        text_columns = None if columns is None else tuple(columns)
        extend = tuple(values.get("extend") or ()) or None
        read = {**values, "text_columns": text_columns, "extend": extend}
        return RunSpec(**{**read, **changed})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{source} is damaged: its arguments are not those of a run ({error}); start the run "
            "anew in another folder"
        ) from error


def command(spec: RunSpec) -> str:
    """The command line that runs `spec`, but for the output folder.

    >>> command(RunSpec(data="my data", epochs=1, settings={"policy": "top"}))[:52]
    "rgft train --model minilm --data 'my data' --method "
    """
    parts = ["rgft", "train"]
    for option in fields(RunSpec):
        value = getattr(spec, option.name)
        if option.name == "settings":
            for key, setting in value.items():
                parts += ["--set", f"{key}={_written(setting)}"]
        elif option.name == "extend":
            parts += [part for file in value or () for part in ("--extend", file)]
        elif isinstance(value, bool):
            parts.append(f"--{'' if value else 'no-'}{option.name.replace('_', '-')}")
        elif value is not None:
            text = join_columns(value) if isinstance(value, tuple) else str(value)
            parts += [f"--{option.name.replace('_', '-')}", text]
    return shlex.join(parts)


def relative_to(folder: Path, spec: RunSpec) -> RunSpec:
    """The spec with what lies below `folder` by paths from there.

    >>> spec = RunSpec(model="/here/minilm", data="/here/rows", extend=("/there/own.py",))
    >>> near = relative_to(Path("/here"), spec)
    >>> near.model, near.data, near.extend
    ('./minilm', './rows', ('/there/own.py',))
    """

    def near(path: str) -> str:
        below = Path(path).is_relative_to(folder)
        return f"./{Path(path).relative_to(folder).as_posix()}" if below else path

    data = None if spec.data is None else near(spec.data)
    files = None if spec.extend is None else tuple(map(near, spec.extend))
    return replace(spec, model=near(spec.model), data=data, extend=files)


def join_columns(names: tuple[str, ...]) -> str:
    """Names with commas between them, quoted as in CSV where they need it."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def split_columns(text: str) -> tuple[str, ...]:
    """What `join_columns` was given.

    >>> split_columns('title, "a, b"')
    ('title', 'a, b')
    """
    names = next(csv.reader([text], skipinitialspace=True), [])
    return tuple(name.strip() for name in names)


def _written(setting: Any) -> str:
    if isinstance(setting, str):
        return setting
    return "inf" if setting == math.inf else json.dumps(setting)
