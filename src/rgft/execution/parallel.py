"""Which processes train a model together, and what of that a guide cannot work with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from rgft.errors import InputError
from rgft.processes import Processes
from rgft.shards import is_sharded


def many() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_processes(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Processes | None:
    """The processes that train `model`: those of its wrapper, or that share its parameters.

    Raises:
        InputError: Parameters are sharded over other processes than all.
    """
    if not many():
        return None
    if isinstance(model, DistributedDataParallel):
        return Processes(model.process_group)
    meshes = {p.device_mesh.size() for p in parameters if is_sharded(p)}  # type: ignore[attr-defined]
    if meshes - {dist.get_world_size()}:
        raise InputError(
            f"parameters are sharded over {min(meshes)} of {dist.get_world_size()} processes; "
            "allowed: over all of them, with a second dimension of the mesh for replicas"
        )
    return Processes() if meshes else None


def check_wrapper(wrapper: DistributedDataParallel, *, freezes: bool) -> None:
    """Refuse a wrapper that would not carry a plan out.

    Args:
        wrapper: Around the model; all that a plan may train requires a gradient now.
        freezes: Whether plans freeze anything.

    Raises:
        InputError: It would stop with an error, or leave gradients unreduced without one.
    """
    ignored = set(wrapper.parameters_to_ignore)
    named = wrapper.module.named_parameters()
    trainable = sum(p.requires_grad for name, p in named if name not in ignored)
    reduced = int(
        wrapper._get_ddp_logging_data()[  # type: ignore[no-untyped-call]
            "num_parameter_tensors"
        ]
    )
    if reduced != trainable:
        raise InputError(
            f"DistributedDataParallel reduces {reduced} parameters, of {trainable} that require a "
            "gradient: what is frozen when it is built is never reduced; build it while all that "
            "will ever train requires a gradient, and the Guide after it"
        )
    if freezes and wrapper.static_graph:
        raise InputError(
            "static_graph=True fixes which parameters have a gradient, and plans freeze some; "
            "build DistributedDataParallel without it, and with find_unused_parameters=True"
        )
    if freezes and not wrapper.find_unused_parameters:
        raise InputError(
            "DistributedDataParallel waits for the gradients of frozen parameters; build it with "
            "find_unused_parameters=True (Trainer: ddp_find_unused_parameters=True; Lightning: "
            "strategy='ddp_find_unused_parameters_true'; Accelerate: kwargs_handlers="
            "[DistributedDataParallelKwargs(find_unused_parameters=True)])"
        )


def when_wrapped(
    model: nn.Module, found: Callable[[DistributedDataParallel], None]
) -> RemovableHandle:
    """Call `found` with the wrapper around `model` before its first forward pass in training.

    Trainers give callbacks the model without its wrapper; that of Lightning is around the
    LightningModule, which holds the model.
    """

    def look(module: nn.Module, args: Any) -> None:
        del args
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None and any(part is module for part in wrapper.modules()):
            handle.remove()
            found(wrapper)

    handle = model.register_forward_pre_hook(look, prepend=True)
    return handle


def refuse_engines(model: nn.Module, optimizer: Any) -> None:
    """Refuse engines that rebuild parameters or optimizers in ways that defeat a plan.

    Raises:
        InputError: One of them is there.
    """
    holders = [model, optimizer, getattr(optimizer, "optimizer", None)]
    if any(_is_of(holder, "deepspeed") for holder in holders):
        raise InputError(
            "DeepSpeed flattens parameters into buffers of its own and steps frozen ones with zero "
            "gradients, so that a plan would silently not be carried out; use DDP or FSDP2, or for "
            "learning rates alone rgft.integrations.deepspeed"
        )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InputError(
            "FullyShardedDataParallel (FSDP1) flattens parameters of several components into one; "
            "use fully_shard (FSDP2; with Accelerate fsdp_version: 2)"
        )
    if any(_is_of(holder, "torch.distributed.optim") for holder in holders):
        raise InputError(
            f"{type(optimizer).__name__} steps with groups of its own on each process, where "
            "learning rates per component do not arrive; use FSDP2 to shard optimizer state"
        )


def _is_of(holder: Any, package: str) -> bool:
    """Whether the class of an object, or one it derives from, is of that package."""
    if package not in sys.modules and package.partition(".")[0] not in sys.modules:
        return False
    names = [kind.__module__ or "" for kind in type(holder).__mro__]
    return any(name == package or name.startswith(f"{package}.") for name in names)


def settle_types(model: nn.Module) -> None:
    """Let FSDP2 choose the types of its reductions now, while everything requires a gradient.

    It does so at the first forward pass, and for a group that is all frozen then never again: with
    mixed precision the group could not be trained later (pytorch#186998).
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    inner: set[nn.Module] = set()
    for part in model.modules():  # outer ones come first
        if isinstance(part, module.FSDPModule) and part not in inner:
            inner.update(part.modules())
            part._get_fsdp_state()._lazy_init()  # as the first forward pass does; once
