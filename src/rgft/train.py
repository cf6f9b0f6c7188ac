"""Run one method on one task with one model and one seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from rgft import records
from rgft.adapters.allocation import RankAllocation
from rgft.batches import numbered
from rgft.best_stage import BestStage
from rgft.checkpoints import CACHE, FOLDER, newest_checkpoint, step_of
from rgft.errors import InputError
from rgft.extensions import extend
from rgft.folder_lock import held
from rgft.integrations.transformers import RGFTCallback
from rgft.launch import Launch, join
from rgft.methods import find_method
from rgft.models import PACKAGED, locate
from rgft.outcome import outcome
from rgft.preparation import Prepared, prepare
from rgft.processes import Processes
from rgft.progress import Progress, Quiet, waiting
from rgft.recorder import Pace, RunRecorder, StopOnSignal
from rgft.run_folder import (
    begin,
    clear,
    clear_checkpoints,
    clear_results,
    finish,
    now,
    probe_writable,
    refuse_foreign,
    save,
    save_ledgers,
    save_written,
)
from rgft.run_samples import load_data
from rgft.run_trainer import RunTrainer, of_labels
from rgft.spec import RunSpec, arguments, command
from rgft.storage import storage_problem
from rgft.tasks.folder import require_folder
from rgft.text_to_text import TextToTextInputs
from rgft.text_trainer import TextTrainer
from rgft.training_arguments import evaluations_within_budget, optimizer, training_arguments

__all__ = ["RunSpec", "command", "run"]


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
    launch = join()
    spec = launch.together(partial(_known, spec))
    launch.refuse_different("command", command(spec))
    record = launch.together(lambda: begin(spec, output_dir, resume=resume, overwrite=overwrite))
    if record["status"] == "finished":
        launch.alone(lambda: finish(output_dir))
        return record
    new = launch.first and not output_dir.exists()
    launch.alone(lambda: probe_writable(output_dir))
    begun: list[bool] = []
    try:
        with Quiet(), ExitStack() as until_end:
            launch.alone(lambda: until_end.enter_context(held(output_dir)))
            prepared = _prepared(spec, output_dir, record, launch, until_end)
            if not resume:
                names = prepared.inputs.files
                launch.alone(lambda: refuse_foreign(output_dir, names))
            found = launch.told(lambda: str(newest_checkpoint(output_dir) or "")) if resume else ""
            checkpoint = Path(found) if found else None
            if checkpoint is None:  # outputs that an earlier start kept would be had for nothing
                launch.alone(lambda: clear_checkpoints(output_dir))
            record |= {"status": "running", **_facts(spec, prepared)}
            launch.alone(lambda: _note_start(output_dir, record, step_of(checkpoint), launch))
            begun.append(True)
            if launch.first and (said := _said(prepared, resume, checkpoint)):
                tqdm.write(said)
            return _execute(spec, prepared, output_dir, record, checkpoint, launch)
    except Exception as error:
        unfinished = begun and record["status"] == "running"
        if launch.first and isinstance(error, InputError) and unfinished and not resume:
            clear(output_dir)  # a run that cannot be finished leaves nothing
        reason = storage_problem(error)
        if isinstance(error, InputError) or reason is None:
            raise
        raise InputError(
            f"cannot write to {output_dir}: {reason}; make room, then go on with --resume"
        ) from error
    finally:
        if new and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _said(prepared: Prepared, resume: bool, checkpoint: Path | None) -> str | None:
    """What to say of how a run starts."""
    if not resume:
        return prepared.start
    if checkpoint is None:
        return "there is no whole checkpoint: the run starts from the beginning"
    return f"going on from step {step_of(checkpoint)}"


def _known(spec: RunSpec) -> RunSpec:
    """With folders by absolute paths, a known method, and settings that a record can hold."""
    spec = _anywhere(spec)
    arguments(spec)
    extend(spec.extend or ())
    find_method(spec.method)
    return spec


def _prepared(
    spec: RunSpec,
    output_dir: Path,
    record: dict[str, Any],
    launch: Launch,
    until_end: ExitStack,
) -> Prepared:
    """Model and data, in every process."""
    if spec.data is not None:
        folder = Path(spec.data)
        launch.alone(lambda: require_folder(folder))  # before a packaged model is unpacked
    launch.alone(lambda: locate(spec.model))  # a missing package is told before data is fetched
    if launch.size > 1:
        launch.alone(lambda: load_data(spec))  # what has to be fetched is, once

    def work() -> Prepared:
        prepared = prepare(spec, launch, until_end)
        if record.setdefault("data", prepared.fingerprint) != prepared.fingerprint:
            raise InputError(
                f"the data has changed since {output_dir} was begun; start anew with --overwrite"
            )
        return prepared

    prepared = launch.together(work)
    launch.refuse_different("data", prepared.fingerprint)
    return prepared


def _note_start(output_dir: Path, record: dict[str, Any], step: int, launch: Launch) -> None:
    """Write the record of a run that starts, and remove what one before it left."""
    records.note_environment(record, step, launch.size)
    records.write_run(output_dir, record)
    clear_results(output_dir)


def _anywhere(spec: RunSpec) -> RunSpec:
    """With folders by absolute paths: a record is used from other working folders, too."""
    data = None if spec.data is None else os.path.abspath(spec.data)
    folder = spec.model not in PACKAGED and Path(spec.model).exists()
    model = os.path.abspath(spec.model) if folder else spec.model
    files = tuple(os.path.abspath(file) for file in spec.extend or ())
    return replace(spec, data=data, model=model, extend=files or None)


def _facts(spec: RunSpec, prepared: Prepared) -> dict[str, Any]:
    """What is known of a run before it starts."""
    config = {f.name: _told(getattr(prepared.config, f.name)) for f in fields(prepared.config)}
    return {
        "method": spec.method,
        "task": prepared.task.name,
        "model": spec.model,
        "seed": spec.seed,
        "lr": prepared.lr,
        "epochs": spec.epochs,
        "budget": spec.budget,
        "batch_size": prepared.batch_size,
        "adam_beta2": prepared.adam_beta2,
        "dropout": prepared.dropout,
        "layers": prepared.layers._asdict(),
        "survey": None if prepared.survey is None else asdict(prepared.survey),
        "start": prepared.start,
        "granularity": config["granularity"],
        "config": config,
        "rows": {split: len(rows) for split, rows in prepared.examples.items()},
        "command": command(spec),
        "metric": prepared.task.metric,
    }


def _execute(  # noqa: PLR0913, PLR0917 - what a run consists of
    spec: RunSpec,
    prepared: Prepared,
    output_dir: Path,
    record: dict[str, Any],
    checkpoint: Path | None,
    launch: Launch,
) -> dict[str, Any]:
    """Train, evaluate, write."""
    guidance = RGFTCallback(
        prepared.config,
        prepared.sample_losses,
        prepared.spending,
        prepared.storage(output_dir / FOLDER / CACHE),
        prepared.meter,
    )
    spending, processes = prepared.spending, launch.processes
    if spending is not None and processes is not None:
        spending.share(processes)
    recorder = RunRecorder(prepared.meter, guidance, prepared.sampling.ledger, processes)
    interruption, progress = StopOnSignal(processes), Progress(prepared.task.metric, spending)
    pace = [] if spending is None else [Pace(spending, evaluations_within_budget(spec, prepared))]
    best = [BestStage(spending)] if spending and prepared.auto else []
    shown = [progress] if launch.first else []
    allocation = _allocation(prepared)
    set_seed(spec.seed)
    settings = training_arguments(spec, prepared, output_dir)
    trainer = _trainer(spec, prepared, recorder, processes)(
        identified=prepared.prefix_cache is not None,
        processes=processes,
        allocation=allocation,
        model=prepared.model,
        args=settings,
        optimizer_cls_and_kwargs=optimizer(prepared, settings),
        train_dataset=numbered(prepared.examples["train"]),
        eval_dataset=prepared.examples["validation"],
        data_collator=prepared.inputs.collate,
        callbacks=[
            *(guidance, recorder, *pace, *best, *shown, interruption),
            *([] if allocation is None else [allocation]),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        trainer.go_on(checkpoint)
    with interruption, progress:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interruption.stopped and trainer.state.global_step < trainer.state.max_steps:
        record |= {"status": "interrupted", "step": trainer.state.global_step}
        launch.alone(lambda: records.write_run(output_dir, record))
        return record
    trainer.load_best()
    found = outcome(trainer, prepared, recorder, guidance, launch)
    prepared.meter.close()
    record |= {"status": "finished", "finished": now(), **found}
    if allocation is not None:
        record["ranks"] = allocation.ranks
    if launch.first:
        _leave_behind(trainer, prepared, output_dir, record, guidance)
    return record


def _trainer(
    spec: RunSpec, prepared: Prepared, recorder: RunRecorder, processes: Processes | None
) -> Callable[..., RunTrainer]:
    """The Trainer for what the model puts out."""
    task, inputs = prepared.task, prepared.inputs
    if isinstance(inputs, TextToTextInputs):
        return partial(
            TextTrainer,
            recorder,
            inputs,
            prepared.sampling,
            metric=task.metric,
        )
    return partial(
        RunTrainer,
        recorder,
        task.kind,
        prepared.sampling,
        measure=partial(of_labels, task.kind, processes=processes),
    )


def _leave_behind(
    trainer: RunTrainer,
    prepared: Prepared,
    output_dir: Path,
    record: dict[str, Any],
    guidance: RGFTCallback,
) -> None:
    """Write what a run is for."""
    assert guidance.guide is not None
    write = None if prepared.adapter is None else prepared.adapter.save
    save(output_dir, trainer.model, prepared.inputs.processor, write)
    save_ledgers(output_dir, guidance.guide.error_map, prepared.sampling.ledger)
    if isinstance(trainer, TextTrainer):
        save_written(output_dir, trainer.written)
    record["forgetting"] = _forgetting(trainer, prepared)
    records.write_run(output_dir, record)
    finish(output_dir)


def _forgetting(trainer: RunTrainer, prepared: Prepared) -> dict[str, Any] | None:
    """What the pre-trained model could do, and this one can; None where it is not asked."""
    if prepared.untaught is None:
        return None
    # without the mixed precision that the model was trained in
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with waiting("measuring what was forgotten"):
        return prepared.untaught.against(model)


def _allocation(prepared: Prepared) -> RankAllocation | None:
    """What prunes ranks, where the method does."""
    if prepared.adapter is None or not prepared.adapter.allocates:
        return None
    return RankAllocation(prepared.model, prepared.spending)


def _told(value: Any) -> Any:
    """A setting as a record says it: a function or policy of a user's own by its name."""
    if value is None or isinstance(value, (str, int, float, bool, list, tuple)):
        return value
    function = getattr(value, "lr_scale", value)
    return getattr(function, "__qualname__", type(value).__qualname__)
