"""The folder of a run: what may be begun in it, what is swept away, what is left in the end."""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rgft import records
from rgft.adapters.folders import ADAPTER, BASE
from rgft.atomic import PREFIX, SUFFIX, atomic_path
from rgft.checkpoints import FOLDER
from rgft.error_map import ErrorMap
from rgft.errors import InputError
from rgft.progress import waiting
from rgft.report import write_report
from rgft.residuals import Ledger
from rgft.spec import RunSpec, arguments

ERROR_MAP_FILE = "error_map.parquet"
LEDGER_FILE = "residuals.parquet"
WRITTEN_FILE = "written.jsonl"
REPORT_FILES = ("error_map.png", "report.html")  # in the order of writing
MODEL_FILES = (  # of whatever model and processor; some by patterns
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "spm.model", "tokenizer.model"),
    *("sentencepiece.bpe.model", "preprocessor_config.json"),
)
RESULTS = (ADAPTER, BASE, ERROR_MAP_FILE, LEDGER_FILE, WRITTEN_FILE, *REPORT_FILES, *MODEL_FILES)
OURS = (FOLDER, records.RUN_FILE, *RESULTS)
STAGING = f"{PREFIX}saving{SUFFIX}"


def begin(spec: RunSpec, output_dir: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """The record to begin or go on with. Nothing is written."""
    given = arguments(spec)
    if resume:
        record = records.read_run(output_dir)
        before = record.get("arguments")
        if not isinstance(before, dict) or "status" not in record:
            raise InputError(
                f"{output_dir / records.RUN_FILE} is damaged (no arguments); "
                "start the run anew in another folder"
            )
        changed = {k for k, v in given.items() if before.get(k) != v}
        if changed:
            name = min(changed)
            was, now_is = (_given(values.get(name)) for values in (before, given))
            raise InputError(
                f"{name} was {was} in the run to resume and is {now_is} now; resume with the same "
                "settings or, once it has finished, train on from its model in another folder: "
                f"--model {shlex.quote(str(output_dir))} --output-dir NEW"
            )
        record.pop("step", None)
        return record
    held = [folder.resolve() for folder in (output_dir, *_matching(output_dir, OURS))]
    for name, source in (("model", spec.model), ("data", spec.data)):
        if source is not None and Path(source).resolve() in held:
            raise InputError(f"{output_dir} holds the {name}; give another --output-dir")
    refuse_foreign(output_dir, OURS)
    if records.is_run(output_dir) and not overwrite:
        raise InputError(
            f"{output_dir} already holds a run; give --resume, --overwrite or another folder"
        )
    return {"status": "running", "arguments": given, "started": now()}


def _given(value: Any) -> str:
    return "not given" if value is None else repr(value)


def refuse_foreign(output_dir: Path, names: Iterable[str]) -> None:
    """What a run would replace or remove must be of an earlier run.

    Args:
        output_dir: Folder of the run; it need not exist.
        names: Of files and folders in it, or patterns of names.

    Raises:
        InputError: One of them is there, and no record of a run.
    """
    foreign = next(_matching(output_dir, names), None)
    if foreign is not None and not records.is_run(output_dir):
        raise InputError(
            f"{output_dir} holds {foreign.name} but no record of a run, and a run would replace "
            "it; give --output-dir an empty or a new folder"
        )


def probe_writable(output_dir: Path) -> None:
    """Make the folder, and see now rather than after training whether it can be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        sweep(output_dir)
        probe = output_dir / f"{PREFIX}probe.{os.getpid()}{SUFFIX}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {output_dir}: {error.strerror}; give another --output-dir"
        ) from error


def clear(output_dir: Path) -> None:
    """Remove a run. Its record goes last: a folder without one is not ours to clear."""
    clear_results(output_dir)
    clear_checkpoints(output_dir)
    (output_dir / records.RUN_FILE).unlink(missing_ok=True)


def clear_checkpoints(output_dir: Path) -> None:
    """Remove what only a resume would need."""
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)


def clear_results(output_dir: Path) -> None:
    """Remove what a run left at its end, but for its record."""
    for path in _matching(output_dir, RESULTS):
        _remove(path)


def finish(output_dir: Path) -> None:
    """Write the report where a kill prevented it, and remove what only a resume would need."""
    if not (output_dir / REPORT_FILES[-1]).exists():
        with waiting("writing the report"):
            write_report(output_dir)
    clear_checkpoints(output_dir)
    sweep(output_dir)


def sweep(output_dir: Path) -> None:
    """Remove what a kill left half-written."""
    for unfinished in output_dir.glob(f"{PREFIX}*{SUFFIX}"):
        _remove(unfinished)


def save(
    output_dir: Path, model: Any, processor: Any, write: Callable[[Any, Path], None] | None = None
) -> None:
    """The model and its processor, each file whole.

    Args:
        output_dir: Folder of the run.
        model: As it was trained.
        processor: Its tokenizer or image processor.
        write: Writes the model to a folder, where `save_pretrained` is not the way.
    """
    staging = output_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    if write is None:
        model.save_pretrained(staging)
    else:
        write(model, staging)
    processor.save_pretrained(staging)
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        target = output_dir / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(staging)


def save_ledgers(output_dir: Path, error_map: ErrorMap, ledger: Ledger) -> None:
    """Where in the model the error came from, and on which samples."""
    error_map.to_parquet(output_dir / ERROR_MAP_FILE)
    ledger.write(output_dir / LEDGER_FILE)


def save_written(output_dir: Path, written: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """What the model read and wrote for rows of each split at the end, and the references."""
    lines = [
        json.dumps({"split": split, **row}) + "\n"
        for split, rows in written.items()
        for row in rows
        if split != "eval"  # the last evaluation in training
    ]
    with atomic_path(output_dir / WRITTEN_FILE) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _matching(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """What there is of these names, in their order; links that lead nowhere too."""
    present = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        yield from (folder / found for found in fnmatch.filter(present, name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
