"""Which checkpoint a run can go on from."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

FOLDER = "checkpoints"
CACHE = "prefix_cache"  # what the frozen deepest layers put out
VISITS = "visits.pt"  # which samples were visited, and how wrong the model was on them
NEEDED = ("optimizer.pt", "scheduler.pt", "training_args.bin", VISITS)
RANDOM = "rng_state*.pth"  # one of each process


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that was written to its end; None where there is none.

    The Trainer writes `trainer_state.json` last, so that a checkpoint cut off by a kill has none or
    one that does not parse. Such folders, and those with a file that has been cut off since, are
    removed.
    """
    found: list[tuple[int, Path]] = []
    for folder in (output_dir / FOLDER).glob("checkpoint-*"):
        step = _step_of_whole(folder)
        if step is None:
            shutil.rmtree(folder)
        else:
            found.append((step, folder))
    return max(found)[1] if found else None


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 without one.

    >>> step_of(Path("checkpoints/checkpoint-120"))
    120
    """
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _step_of_whole(folder: Path) -> int | None:
    """The step of a checkpoint, or None if it is not whole."""
    weights = list(folder.glob("*.safetensors"))
    random = list(folder.glob(RANDOM))
    packed = [*(folder / name for name in NEEDED), *random]
    if not (weights and random) or not all(zipfile.is_zipfile(path) for path in packed):
        return None
    try:
        for path in weights:
            with safe_open(path, "pt"):  # compares its header with its size
                pass
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
