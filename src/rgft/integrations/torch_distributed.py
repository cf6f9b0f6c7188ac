"""Checkpoints by torch.distributed.checkpoint: written by many processes, read by any number."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rgft.atomic import atomic_path
from rgft.errors import InputError
from rgft.execution.parallel import many
from rgft.guide import Guide
from rgft.integrations.checkpoint_reader import TensorReader, damaged
from rgft.resumption import check_state
from rgft.shards import is_sharded
from rgft.structure.layers import without_replicas

REST = "rest.pt"  # what every process has alike, and what is no tensor
METADATA = ".metadata"  # torch writes it last
OPTIMIZER = "optimizer."


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guide: Guide,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, each process its part; all have to call it.

    Its metadata comes last, and goes first where the folder has a checkpoint already: a folder that
    a kill left unfinished has none, and is refused.

    Args:
        folder: Made if it is missing; reachable for all processes. What it has is lost: with one
            folder a save there is always one that is whole.
        model: In whatever wrapper, sharded or not.
        optimizer: Over its parameters.
        guide: Of both.
        extra: Whatever else a run needs (schedule, spending, ledger), the same in all processes:
            tensors, numbers, strings, lists and dicts of them.
    """
    folder = Path(folder)
    _invalidate(folder)
    names = _names(model)
    held = {names[p]: state for p, state in optimizer.state.items() if p in names}
    numbers = {
        name: {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        for name, state in held.items()
    }
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        rest = {"guide": guide.state_dict(), "groups": groups, "numbers": numbers}
        with atomic_path(folder / REST) as temporary:
            torch.save({**rest, "extra": dict(extra or {})}, temporary)
    tensors = {
        f"{OPTIMIZER}{name}.{key}": value
        for name, state in held.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    with _without_remark():
        save({**_weights(model), **tensors}, checkpoint_id=folder)


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, guide: Guide
) -> dict[str, Any]:
    """Go on from a checkpoint, on as many processes as there are now; all have to call it.

    Only what the checkpoint has is given to the optimizer: what was never stepped has no state.
    torch.distributed.checkpoint's own way steps the optimizer once to make room, which a guide
    would count. No code from the data is run: metadata may name torch's own classes for it alone,
    and all else is read with `weights_only=True`.

    Returns:
        The `extra` that was given.

    Raises:
        InputError: The folder is no whole checkpoint, or one of another model or optimizer; nothing
            has been changed then.
    """
    folder = Path(folder)
    if not (folder / METADATA).is_file() or not (folder / REST).is_file():
        raise InputError(f"{folder} is no whole checkpoint of save_checkpoint; give another")
    reader = TensorReader(folder)
    there: dict[str, Any] = reader.read_metadata().state_dict_metadata
    rest = _read_rest(folder)
    weights = _weights(model)
    parameters = {name: parameter for parameter, name in _names(model).items()}
    _refuse_other_model(folder, there, weights)
    kept = {_split(key)[0] for key in there if key.startswith(OPTIMIZER)} | rest["numbers"].keys()
    _refuse_other_optimizer(folder, kept - parameters.keys(), len(rest["groups"]), optimizer)
    check_state(rest["guide"], guide.components, guide.config)
    tensors = {
        key: _room(parameters[_split(key)[0]], entry)
        for key, entry in there.items()
        if key.startswith(OPTIMIZER)
    }
    with _without_remark():
        load({**weights, **tensors}, storage_reader=reader)
    state: dict[str, dict[str, Any]] = {n: dict(values) for n, values in rest["numbers"].items()}
    for key, tensor in tensors.items():
        name, kind = _split(key)
        state.setdefault(name, {})[kind] = tensor
    for name, values in state.items():
        optimizer.state[parameters[name]] = values
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        group.update(saved)
    guide.load_state_dict(rest["guide"])
    return dict(rest["extra"])


def _invalidate(folder: Path) -> None:
    """Parts of two saves must never look like one."""
    if _rank() == 0:
        (folder / METADATA).unlink(missing_ok=True)
    if many():
        dist.barrier()  # before any process writes, or looks


def _read_rest(folder: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(folder / REST, weights_only=True))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise InputError(damaged(folder / REST)) from error


def _refuse_other_model(
    folder: Path, there: Mapping[str, TensorStorageMetadata], weights: Mapping[str, Tensor]
) -> None:
    """Refuse what has other parameters or buffers."""
    saved = {
        key: tuple(entry.size) for key, entry in there.items() if not key.startswith(OPTIMIZER)
    }
    here = {key: tuple(value.shape) for key, value in weights.items()}
    for key in sorted(saved.keys() | here.keys()):
        if key not in saved:
            what = f"it has no '{key}', which the model has"
        elif key not in here:
            what = f"it has '{key}', which the model has not"
        elif saved[key] != here[key]:
            what = f"its '{key}' is {saved[key]}, here {here[key]}"
        else:
            continue
        raise InputError(f"{folder} is of another model: {what}; give the model that was saved")


def _refuse_other_optimizer(
    folder: Path, unknown: set[str], groups: int, optimizer: torch.optim.Optimizer
) -> None:
    """Refuse what is of other parameters, or other groups of them."""
    here = len(optimizer.param_groups)
    what = None
    if unknown:
        what = f"it has a state of '{min(unknown)}', which is no parameter of the model"
    elif groups != here:
        what = f"parameter groups are {groups}, here {here}"
    if what is not None:
        raise InputError(f"{folder} is of another optimizer: {what}; build it as it was saved")


def _split(key: str) -> tuple[str, str]:
    """Name of the parameter, and of what the optimizer keeps of it."""
    name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
    return name, kind


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that they have without a wrapper."""
    own = without_replicas(model).state_dict().items()
    return {f"model.{name}": value for name, value in own if isinstance(value, Tensor)}


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in without_replicas(model).named_parameters()}


def _room(parameter: Tensor, entry: TensorStorageMetadata) -> Tensor:
    """A tensor for a part of the optimizer's state, sharded as its parameter is."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    assert not is_sharded(parameter) or entry.size.numel() == 1
    return torch.zeros(entry.size, dtype=dtype)


@contextmanager
def _without_remark() -> Iterator[None]:
    """One process is no accident."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
