"""Checkpoints by torch.distributed.checkpoint: written by many processes, read by any number."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rgft.atomic import atomic_path
from rgft.errors import InputError
from rgft.guide import Guide
from rgft.shards import is_sharded
from rgft.structure.layers import without_replicas

REST = "rest.pt"  # what every process has alike, and what is no tensor


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guide: Guide,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, each process its part; all have to call it.

    Its metadata comes last: a folder that a kill left unfinished has none, and is refused.

    Args:
        folder: Made if it is missing; reachable for all processes.
        model: In whatever wrapper, sharded or not.
        optimizer: Over its parameters.
        guide: Of both.
        extra: Whatever else a run needs (schedule, spending, ledger), the same in all processes:
            tensors, numbers, strings, lists and dicts of them.
    """
    folder = Path(folder)
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
        f"optimizer.{name}.{key}": value
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
    would count. No code from the data is run: what is no tensor is read with `weights_only=True`.

    Returns:
        The `extra` that was given.

    Raises:
        InputError: The folder is no whole checkpoint, or one of another model.
    """
    folder = Path(folder)
    if not (folder / ".metadata").is_file() or not (folder / REST).is_file():
        raise InputError(f"{folder} is no whole checkpoint of save_checkpoint; give another")
    there = FileSystemReader(folder).read_metadata().state_dict_metadata
    rest = torch.load(folder / REST, weights_only=True)
    weights = _weights(model)
    missing = sorted(weights.keys() - there.keys())
    if missing:
        raise InputError(f"{folder} is of another model: it has no '{missing[0]}'")
    parameters = {name: parameter for parameter, name in _names(model).items()}
    tensors: dict[str, Tensor] = {}
    for key, entry in there.items():
        if key.startswith("optimizer.") and isinstance(entry, TensorStorageMetadata):
            parameter = parameters[key.removeprefix("optimizer.").rpartition(".")[0]]
            tensors[key] = _room(parameter, entry)
    with _without_remark():
        load({**weights, **tensors}, checkpoint_id=folder)
    state: dict[str, dict[str, Any]] = {n: dict(values) for n, values in rest["numbers"].items()}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        state.setdefault(name, {})[kind] = tensor
    for name, values in state.items():
        optimizer.state[parameters[name]] = values
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        group.update(saved)
    guide.load_state_dict(rest["guide"])
    return dict(rest["extra"])


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
