"""What a run leaves behind: `run.json`, written whole or not at all."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rgft.atomic import write_text_atomically
from rgft.errors import InputError

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

SCHEMA = 1
RUN_FILE = "run.json"
PACKAGES = ("rgft", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def write_run(output_dir: Path, record: dict[str, Any]) -> None:
    """Write the record of a run; values that are not finite become null."""
    text = json.dumps({"schema": SCHEMA, **finite(record)}, indent=1, allow_nan=False)
    write_text_atomically(output_dir / RUN_FILE, text + "\n")


def read_run(output_dir: Path) -> dict[str, Any]:
    """The record of the run in `output_dir`.

    Raises:
        InputError: There is none, or it is damaged.
    """
    path = output_dir / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{output_dir} holds no run (no {RUN_FILE}); give the folder of a run"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged: {error}; start the run anew in another folder"
        ) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a record of this version (schema {SCHEMA})")
    return record


def is_run(output_dir: Path) -> bool:
    """Whether the folder holds the record of a run, of any version, rather than another file."""
    try:
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and type(record.get("schema")) is int and "status" in record


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(processes: int = 1) -> dict[str, Any]:
    """What the run ran on: the machine of the first of so many processes."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "processes": processes,
    }


def code_revision() -> str | None:
    """Commit of the source tree this package runs from, with "+changes"; None outside of one."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--", str(folder)) else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return None


def note_environment(record: dict[str, Any], step: int, processes: int = 1) -> None:
    """Add what the run runs on: of its first start, then of every resume with the step it is at."""
    found = {
        "versions": versions(),
        "hardware": hardware(processes),
        "code_revision": code_revision(),
    }
    if "versions" in record:
        record["resumed"] = [*record.get("resumed", []), {"step": step, **found}]
    else:
        record |= found


def peak_memory_bytes() -> int | None:
    """Most memory held so far: on the accelerator, or resident where there is none.

    None where the system does not tell.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finite(value: Any) -> Any:
    """The same with None for what is no finite number, of which JSON knows none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
