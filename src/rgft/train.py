"""Run one method on one task with one model and one seed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from rgft import metrics, records
from rgft.atomic import atomic_path
from rgft.batches import Collator, Example, tokenize
from rgft.checkpoints import FOLDER, newest_checkpoint
from rgft.components import partition
from rgft.config import Config
from rgft.costs import CostModel, FlopMeter
from rgft.errors import InputError
from rgft.guide import Guide
from rgft.integrations.transformers import RGFTCallback
from rgft.methods import Method, find_method
from rgft.models import load_classifier, load_tokenizer
from rgft.recorder import RunRecorder, StopOnSignal, strip
from rgft.report import write_report
from rgft.tasks import TaskData, load_folder, load_task

ERROR_MAP_FILE = "error_map.parquet"
EVALUATION_BATCH = 64
WARMUP_SHARE = 0.06  # of all steps; RoBERTa's setting for GLUE (Liu et al. 2019)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What to run.

    Attributes:
        model: Folder, hub id, or packaged name ("minilm").
        task: Name of a task; None for the user's own data.
        data: Folder of the task, or of the user's own data.
        text_columns: Text columns of the user's own data; detected by default.
        label_column: Label column of the user's own data; detected by default.
        method: A name in `rgft.METHODS`.
        epochs: Passes over the training data.
        lr: Peak learning rate; None for the method's own.
        seed: Of the head, of the order of the data, of dropout and of the method.
        batch_size: Samples per optimizer step.
        max_length: Tokens a text is cut at.
        granularity: How components are cut; None for the method's own.
        settings: Fields of `Config` that are to differ from the method's own, and lora_rank.
        evaluations: Looks at the validation split per epoch; a checkpoint is saved at each.
    """

    model: str = "minilm"
    task: str | None = None
    data: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    method: str = "rgft"
    epochs: float = 3.0
    lr: float | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int = 128
    granularity: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 4

    def __post_init__(self) -> None:
        checks = {
            "epochs": (0 < self.epochs < math.inf, "a number > 0"),
            "lr": (self.lr is None or 0 < self.lr < math.inf, "a number > 0"),
            "seed": (0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1"),
            "batch_size": (self.batch_size >= 1, "a whole number >= 1"),
            "max_length": (self.max_length >= 4, "a whole number >= 4"),
            "evaluations": (self.evaluations >= 1, "a whole number >= 1"),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: {allowed}")
        if self.task is None and self.data is None:
            raise InputError("no data: give --task NAME (see `rgft data`) or --data DIR")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run, ready to start."""

    task: TaskData
    tokenizer: Any
    model: nn.Module
    method: Method
    config: Config
    lr: float
    meter: FlopMeter
    examples: dict[str, list[Example]]


def run(
    spec: RunSpec, output_dir: Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Fine-tune, evaluate, and leave a run folder behind.

    Args:
        spec: What to run.
        output_dir: Folder of the run; made if it is missing.
        resume: Go on from the newest checkpoint in the folder.
        overwrite: Replace a run that is already there.

    Returns:
        The content of `run.json`; its "status" is "interrupted" after Ctrl-C, else "finished".

    Raises:
        InputError: Something given cannot be used.
    """
    find_method(spec.method)
    record = _open_folder(spec, output_dir, resume=resume, overwrite=overwrite)
    if record["status"] == "finished":
        return record
    prepared = _prepare(spec)
    fingerprint = prepared.task.fingerprint()
    if record.setdefault("data", fingerprint) != fingerprint:
        raise InputError(
            f"the data has changed since {output_dir} was begun; start anew with --overwrite"
        )
    record |= _facts(spec, prepared)
    records.write_run(output_dir, record)
    return _execute(spec, prepared, output_dir, record, resume=resume)


def _open_folder(
    spec: RunSpec, output_dir: Path, *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """The record to begin or go on with."""
    arguments = json.loads(json.dumps(asdict(spec)))
    occupied = (output_dir / records.RUN_FILE).exists()
    if resume:
        record = records.read_run(output_dir)
        changed = {k for k, v in arguments.items() if record["arguments"].get(k) != v}
        if changed:
            name = min(changed)
            raise InputError(
                f"{name} was {record['arguments'].get(name)!r} in the run to resume and is "
                f"{arguments[name]!r} now; resume with the same settings, or start anew"
            )
        return record
    if occupied and not overwrite:
        raise InputError(
            f"{output_dir} already holds a run; give --resume, --overwrite or another folder"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
        (output_dir / records.RUN_FILE).unlink(missing_ok=True)
        with atomic_path(output_dir / ".writable") as probe:
            probe.write_text("")
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {output_dir}: {error.strerror}; give another --output-dir"
        ) from error
    return {"status": "running", "arguments": arguments, "started": _now()}


def load_data(spec: RunSpec) -> TaskData:
    """The task or the user's own data."""
    folder = None if spec.data is None else Path(spec.data)
    if spec.task is not None:
        if spec.text_columns or spec.label_column:
            raise InputError(
                "--text-columns and --label-column go with --data alone, not with --task"
            )
        return load_task(spec.task, folder)
    assert folder is not None
    return load_folder(folder, spec.text_columns, spec.label_column)


def method_config(spec: RunSpec, method: Method) -> tuple[Config, int]:
    """The method's settings with the user's; the rank of LoRA pairs."""
    settings = dict(spec.settings)
    rank = settings.pop("lora_rank", None)
    if rank is not None and not method.lora:
        raise InputError(f"lora_rank has no effect on the method '{spec.method}'; drop it")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise InputError(f"lora_rank is {rank!r}; allowed: a whole number >= 1")
    allowed = [
        f.name for f in fields(Config) if f.name not in ("granularity", "total_steps", "seed")
    ]
    for name in settings:
        if name not in allowed:
            raise InputError(
                f"unknown setting '{name}'; allowed: {', '.join([*allowed, 'lora_rank'])}"
            )
    if spec.granularity is not None:
        settings["granularity"] = spec.granularity
    try:
        return replace(method.config, seed=spec.seed, **settings), rank or 8
    except TypeError as error:
        raise InputError(f"a setting has the wrong type: {error}") from error


def _prepare(spec: RunSpec) -> Prepared:
    method = find_method(spec.method)
    config, rank = method_config(spec, method)
    tokenizer = load_tokenizer(spec.model)
    task = load_data(spec)
    longest = min(spec.max_length, tokenizer.model_max_length)
    set_seed(spec.seed)
    model = load_classifier(spec.model, task.label_names, tokenizer.pad_token_id)
    reference = CostModel(model)
    if method.lora:
        model = add_lora(model, rank)
    partition(model, config.granularity)  # says now what cannot be split
    examples = {split: tokenize(task, split, tokenizer, longest) for split in task.splits}
    lr = spec.lr if spec.lr is not None else method.lr
    meter = FlopMeter(model, reference)
    return Prepared(task, tokenizer, model, method, config, lr, meter, examples)


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA pairs on all linear layers but the head, which trains in full (Hu et al. 2022)."""
    from peft import LoraConfig, TaskType, get_peft_model  # noqa: PLC0415 - slow to import

    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted


def _facts(spec: RunSpec, prepared: Prepared) -> dict[str, Any]:
    """What is known of a run before it starts."""
    config = {k: v if _plain(v) else repr(v) for k, v in asdict(prepared.config).items()}
    return {
        "method": spec.method,
        "task": prepared.task.name,
        "model": spec.model,
        "seed": spec.seed,
        "lr": prepared.lr,
        "epochs": spec.epochs,
        "batch_size": spec.batch_size,
        "granularity": config["granularity"],
        "config": config,
        "rows": {split: len(rows) for split, rows in prepared.examples.items()},
        "command": command(spec),
        "versions": records.versions(),
        "hardware": records.hardware(),
        "code_revision": records.code_revision(),
        "metric": prepared.task.metric,
    }


def command(spec: RunSpec) -> str:
    """The command line that runs `spec`, but for the output folder."""
    parts = ["rgft train"]
    for option in fields(RunSpec):
        value = getattr(spec, option.name)
        if option.name == "settings":
            parts += [f"--set {key}={setting}" for key, setting in value.items()]
        elif value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            parts.append(f"--{option.name.replace('_', '-')} {text}")
    return " ".join(parts)


def _arguments(spec: RunSpec, prepared: Prepared, output_dir: Path) -> TrainingArguments:
    steps_per_epoch = math.ceil(len(prepared.examples["train"]) / spec.batch_size)
    interval = max(1, steps_per_epoch // spec.evaluations)
    total = math.ceil(spec.epochs * steps_per_epoch)
    return TrainingArguments(
        output_dir=str(output_dir / FOLDER),
        num_train_epochs=spec.epochs,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=EVALUATION_BATCH,
        learning_rate=prepared.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(WARMUP_SHARE * total),
        weight_decay=WEIGHT_DECAY,
        seed=spec.seed,
        data_seed=spec.seed,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        logging_steps=max(1, min(10, interval)),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _execute(
    spec: RunSpec, prepared: Prepared, output_dir: Path, record: dict[str, Any], *, resume: bool
) -> dict[str, Any]:
    """Train, evaluate, write."""
    guidance = RGFTCallback(prepared.config, _probe(prepared))
    recorder = RunRecorder(prepared.meter, guidance)
    interruption = StopOnSignal()
    kind = prepared.task.kind
    set_seed(spec.seed)
    trainer = Trainer(
        model=prepared.model,
        args=_arguments(spec, prepared, output_dir),
        train_dataset=prepared.examples["train"],
        eval_dataset=prepared.examples["validation"],
        data_collator=Collator(prepared.tokenizer),
        compute_metrics=lambda p: metrics.compute(kind, p.predictions, p.label_ids),
        callbacks=[guidance, recorder, interruption],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_checkpoint(output_dir) if resume else None
    with interruption:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert guidance.guide is not None
    if interruption.stopped and trainer.state.global_step < trainer.state.max_steps:
        record |= {"status": "interrupted", "step": trainer.state.global_step}
        records.write_run(output_dir, record)
        return record
    prepared.meter.close()
    record |= {"status": "finished", "finished": _now(), **_outcome(trainer, prepared, recorder)}
    _save(trainer, prepared, guidance.guide, output_dir)
    records.write_run(output_dir, record)
    write_report(output_dir)
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
    return record


def _outcome(trainer: Trainer, prepared: Prepared, recorder: RunRecorder) -> dict[str, Any]:
    """Metrics of every split but train, and what the run cost."""
    results: dict[str, dict[str, float]] = {}
    for split, examples in prepared.examples.items():
        if split != "train":
            measured = trainer.predict(examples, metric_key_prefix=split).metrics
            recorder.totals["evaluate"] += measured[f"{split}_runtime"]
            results[split] = strip(measured, f"{split}_")
    parameters = list(prepared.model.parameters())
    components = recorder.components()
    return {
        "metrics": results,
        "history": recorder.history,
        "train_loss": recorder.train_loss,
        "flops": {
            "spent": prepared.meter.spent,
            "full": prepared.meter.full,
            "share": prepared.meter.share,
        },
        "seconds": {key: recorder.totals[key] for key in ("train", "overhead", "evaluate")},
        "peak_memory_bytes": records.peak_memory_bytes(),
        "parameters": {
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(c["numel"] for c in components),
            "updated_per_step": recorder.updated_per_step(),
        },
        "components": components,
    }


def _save(trainer: Trainer, prepared: Prepared, guide: Guide, output_dir: Path) -> None:
    """The model (LoRA pairs merged in), its tokenizer and the error map, each file whole."""
    staging = output_dir / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    model: Any = trainer.model
    if prepared.method.lora:
        model.save_pretrained(staging / "adapter")
        model = model.merge_and_unload()
    model.save_pretrained(staging)
    prepared.tokenizer.save_pretrained(staging)
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        target = output_dir / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(staging)
    guide.error_map.to_parquet(output_dir / ERROR_MAP_FILE)


def _probe(prepared: Prepared) -> Any:
    """Per-sample losses of the first training samples, for the signals that need them."""
    collate = Collator(prepared.tokenizer)

    def losses(count: int) -> Any:
        device = next(prepared.model.parameters()).device
        for example in prepared.examples["train"][:count]:
            batch = {k: v.to(device) for k, v in collate([example]).items()}
            yield prepared.model(**batch).loss

    return losses


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list, tuple))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
