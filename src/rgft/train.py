"""Run one method on one task with one model and one seed."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from rgft import metrics, records
from rgft.batches import Collator, Example, tokenize
from rgft.checkpoints import FOLDER, newest_checkpoint
from rgft.config import Config
from rgft.costs import CostModel, FlopMeter
from rgft.errors import InputError
from rgft.guide import Guide
from rgft.integrations.transformers import RGFTCallback
from rgft.methods import Method, find_method
from rgft.models import load_classifier, load_tokenizer
from rgft.progress import Progress, Quiet
from rgft.recorder import RunRecorder, StopOnSignal, diverged, strip
from rgft.report import write_report
from rgft.settings import method_config
from rgft.spec import RunSpec, arguments, command
from rgft.storage import storage_problem
from rgft.tasks import Kind, TaskData, load_folder, load_task

ERROR_MAP_FILE = "error_map.parquet"
REPORT_FILES = ("error_map.png", "report.html")  # in the order of writing
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
STAGING, ADAPTER = ".saving", "adapter"
EVALUATION_BATCH = 64
WARMUP_SHARE = 0.06  # of all steps; RoBERTa's setting for GLUE (Liu et al. 2019)
WEIGHT_DECAY = 0.01

__all__ = ["RunSpec", "RunTrainer", "command", "run"]


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
    record = _begin(spec, output_dir, resume=resume, overwrite=overwrite)
    if record["status"] == "finished":
        _finish(output_dir)
        return record
    new = not output_dir.exists()
    _probe_folder(output_dir)
    try:
        with Quiet():
            prepared = _prepare(spec)
            fingerprint = prepared.task.fingerprint()
            if record.setdefault("data", fingerprint) != fingerprint:
                raise InputError(
                    f"the data has changed since {output_dir} was begun; "
                    "start anew with --overwrite"
                )
            if not resume:
                _clear(output_dir)
            record |= {"status": "running", **_facts(spec, prepared)}
            records.write_run(output_dir, record)
            return _execute(spec, prepared, output_dir, record, resume=resume)
    except Exception as error:
        reason = storage_problem(error)
        if isinstance(error, InputError) or reason is None:
            raise
        raise InputError(
            f"cannot write to {output_dir}: {reason}; make room, then go on with --resume"
        ) from error
    finally:
        if new and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _begin(spec: RunSpec, output_dir: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """The record to begin or go on with. Nothing is written."""
    given = arguments(spec)
    if resume:
        record = records.read_run(output_dir)
        before = record.get("arguments")
        if not isinstance(before, dict) or "status" not in record:
            raise InputError(
                f"{output_dir / records.RUN_FILE} is damaged (no arguments); "
                "start the run anew with --overwrite"
            )
        changed = {k for k, v in given.items() if before.get(k) != v}
        if changed:
            name = min(changed)
            raise InputError(
                f"{name} was {before.get(name)!r} in the run to resume and is "
                f"{given[name]!r} now; resume with the same settings, or start anew"
            )
        record.pop("step", None)
        return record
    for name, source in (("model", spec.model), ("data", spec.data)):
        if source is not None and output_dir.resolve() == Path(source).resolve():
            raise InputError(f"{output_dir} holds the {name}; give another --output-dir")
    if (output_dir / records.RUN_FILE).exists() and not overwrite:
        raise InputError(
            f"{output_dir} already holds a run; give --resume, --overwrite or another folder"
        )
    return {"status": "running", "arguments": given, "started": _now()}


def _probe_folder(output_dir: Path) -> None:
    """Make the folder, and see now rather than after training whether it can be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _sweep(output_dir)
        probe = output_dir / f".probe.{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {output_dir}: {error.strerror}; give another --output-dir"
        ) from error


def _clear(output_dir: Path) -> None:
    """Remove what an earlier run left."""
    for name in (FOLDER, STAGING, ADAPTER):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (records.RUN_FILE, ERROR_MAP_FILE, *REPORT_FILES, *WEIGHT_FILES):
        (output_dir / name).unlink(missing_ok=True)


def _finish(output_dir: Path) -> None:
    """Write the report where a kill prevented it, and remove what only a resume would need."""
    if not (output_dir / REPORT_FILES[-1]).exists():
        write_report(output_dir)
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
    _sweep(output_dir)


def _sweep(output_dir: Path) -> None:
    """Remove what a kill left half-written."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    for unfinished in output_dir.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)


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
    _check_guidance(model, config)
    examples = {split: tokenize(task, split, tokenizer, longest) for split in task.splits}
    lr = spec.lr if spec.lr is not None else method.lr
    meter = FlopMeter(model, reference)
    return Prepared(task, tokenizer, model, method, config, lr, meter, examples)


def _check_guidance(model: nn.Module, config: Config) -> None:
    """Say now, not after the start, what the guide cannot use."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0)
    trial = replace(config, total_steps=config.total_steps or 1)
    Guide(model, optimizer, trial, probe=lambda count: ()).close()


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA pairs on all linear layers but the head, which trains in full (Hu et al. 2022)."""
    from peft import LoraConfig, TaskType, get_peft_model  # noqa: PLC0415 - slow to import

    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a renamed attribute
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
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _execute(
    spec: RunSpec, prepared: Prepared, output_dir: Path, record: dict[str, Any], *, resume: bool
) -> dict[str, Any]:
    """Train, evaluate, write."""
    guidance = RGFTCallback(prepared.config, _probe(prepared))
    recorder = RunRecorder(prepared.meter, guidance)
    interruption, progress = StopOnSignal(), Progress(prepared.task.metric)
    set_seed(spec.seed)
    trainer = RunTrainer(
        recorder,
        prepared.task.kind,
        model=prepared.model,
        args=_arguments(spec, prepared, output_dir),
        train_dataset=prepared.examples["train"],
        eval_dataset=prepared.examples["validation"],
        data_collator=Collator(prepared.tokenizer),
        callbacks=[guidance, recorder, progress, interruption],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_checkpoint(output_dir) if resume else None
    try:
        with interruption, progress:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if interruption.stopped and trainer.state.global_step < trainer.state.max_steps:
            record |= {"status": "interrupted", "step": trainer.state.global_step}
            records.write_run(output_dir, record)
            return record
        outcome = _outcome(trainer, prepared, recorder)
    except InputError:
        if not resume:  # a run that cannot be finished leaves nothing
            _clear(output_dir)
        raise
    prepared.meter.close()
    assert guidance.guide is not None
    record |= {"status": "finished", "finished": _now(), **outcome}
    _save(trainer, prepared, guidance.guide, output_dir)
    records.write_run(output_dir, record)
    _finish(output_dir)
    return record


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that tells the recorder every loss, and whose metrics must be finite.

    The Trainer's own running mean of the loss is not in its checkpoints.
    """

    def __init__(self, recorder: RunRecorder, kind: Kind, **settings: Any) -> None:
        super().__init__(**settings, compute_metrics=self._metrics)
        self._recorder, self._kind = recorder, kind

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._recorder.add_loss(loss)
        return loss

    def _metrics(self, prediction: Any) -> dict[str, float]:
        if not np.isfinite(prediction.predictions).all():
            raise diverged("output of the model", math.nan, self.state.global_step)
        return metrics.compute(self._kind, prediction.predictions, prediction.label_ids)


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
    staging = output_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    model: Any = trainer.model
    if prepared.method.lora:
        model.save_pretrained(staging / ADAPTER)
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
