"""The folder of a run: what may be begun in it, what is swept away, what is left in the end."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rgft import records
from rgft.checkpoints import FOLDER
from rgft.error_map import ErrorMap
from rgft.errors import InputError
from rgft.report import write_report
from rgft.spec import RunSpec, arguments

ERROR_MAP_FILE = "error_map.parquet"
REPORT_FILES = ("error_map.png", "report.html")  # in the order of writing
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
STAGING, ADAPTER = ".saving", "adapter"


def begin(spec: RunSpec, output_dir: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
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
    return {"status": "running", "arguments": given, "started": now()}


def probe_writable(output_dir: Path) -> None:
    """Make the folder, and see now rather than after training whether it can be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        sweep(output_dir)
        probe = output_dir / f".probe.{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {output_dir}: {error.strerror}; give another --output-dir"
        ) from error


def clear(output_dir: Path) -> None:
    """Remove what an earlier run left."""
    for name in (FOLDER, STAGING, ADAPTER):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (records.RUN_FILE, ERROR_MAP_FILE, *REPORT_FILES, *WEIGHT_FILES):
        (output_dir / name).unlink(missing_ok=True)


def finish(output_dir: Path) -> None:
    """Write the report where a kill prevented it, and remove what only a resume would need."""
    if not (output_dir / REPORT_FILES[-1]).exists():
        write_report(output_dir)
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
    sweep(output_dir)


def sweep(output_dir: Path) -> None:
    """Remove what a kill left half-written."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    for unfinished in output_dir.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)


def save(output_dir: Path, model: Any, tokenizer: Any, error_map: ErrorMap, *, lora: bool) -> None:
    """The model (LoRA pairs merged in), its tokenizer and the error map, each file whole."""
    staging = output_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    if lora:
        model.save_pretrained(staging / ADAPTER)
        model = model.merge_and_unload()
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        target = output_dir / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(staging)
    error_map.to_parquet(output_dir / ERROR_MAP_FILE)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
