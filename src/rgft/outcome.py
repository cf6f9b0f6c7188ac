"""What a finished run came to: its metrics, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rgft import metrics, records
from rgft.integrations.transformers import RGFTCallback
from rgft.launch import Launch
from rgft.preparation import Prepared
from rgft.recorder import RunRecorder, strip
from rgft.run_trainer import RunTrainer
from rgft.spending import Spending
from rgft.tasks import TaskData
from rgft.text_to_text import REFERENCES
from rgft.text_trainer import TextTrainer

TIMES = ("train", "processor", "overhead", "evaluate")


def outcome(
    trainer: RunTrainer,
    prepared: Prepared,
    recorder: RunRecorder,
    guidance: RGFTCallback,
    launch: Launch,
) -> dict[str, Any]:
    """Metrics of every split but train, and what the run cost. Every process has to ask."""
    results: dict[str, dict[str, float]] = {}
    for split, examples in prepared.examples.items():
        if split != "train":
            measured = trainer.predict(examples, metric_key_prefix=split).metrics
            recorder.totals["evaluate"] += measured[f"{split}_runtime"]
            results[split] = strip(measured, f"{split}_")
    spending = prepared.spending
    spent, counted, _ = recorder.meter.totals
    full = counted if spending is None else round(spending.full)
    parameters = list(prepared.model.parameters())
    components = recorder.components()
    return {
        "idle": _idle(prepared, guidance),
        "budget_auto": stage_record(spending) if prepared.auto and spending else None,
        "metrics": results,
        "chance": _chance(trainer, prepared.task, results),
        "history": recorder.history,
        "train_loss": recorder.train_loss,
        "flops": {"spent": spent, "full": full, "share": spent / full},
        "seconds": {
            **{key: recorder.totals[key] for key in TIMES},
            "prepare": prepared.seconds,
            "prepare_processor": prepared.processor,
        },
        "visits": int(prepared.sampling.ledger.visits.sum()),
        "prefix_cache": None if guidance.cache is None else guidance.cache.counts,
        "peak_memory_bytes": _most(records.peak_memory_bytes(), launch),
        "parameters": {
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(
                c["numel"] for c in components if prepared.config.may_train(c["kind"], c["depth"])
            ),
            "updated_per_step": recorder.updated_per_step(),
        },
        "components": components,
    }


def stage_record(spending: Spending) -> dict[str, Any]:
    """The stages of a run that found its own budget, and which of them its model is of."""
    return {"stages": [asdict(stage) for stage in spending.stages], "chosen": spending.best}


def _chance(trainer: RunTrainer, task: TaskData, splits: Iterable[str]) -> dict[str, Any]:
    """The headline metric by split of an answer that ignores its input, and the rows judged."""
    found = {}
    for split in splits:
        if isinstance(trainer, TextTrainer):
            labels = [row[REFERENCES] for row in trainer.written[split]]
        else:
            labels = task.splits[split][task.label_column][:]
        value = metrics.chance(task.kind, task.metric, labels)
        found[split] = {"value": value, "rows": len(labels)}
    return found


def _most(held: int | None, launch: Launch) -> int | None:
    """The most that one of the processes has held; None where the system does not tell."""
    if launch.processes is None:
        return held
    return max(map(int, launch.processes.lists([str(held or 0)]))) or None


def _idle(prepared: Prepared, guidance: RGFTCallback) -> bool:
    """Whether the run was plain fine-tuning: no plan was made, and nothing was chosen before."""
    assert guidance.guide is not None
    kept, of = prepared.layers
    chosen = prepared.survey is not None or prepared.config.frozen_below > 0 or kept < of
    return guidance.guide.idle and not chosen
