"""DistributedDataParallel reduces the gradients that there are, and no zeros for frozen ones."""

# without postponed annotations: DDP compares those of its hooks with the classes themselves

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def reduce_trained_only(wrapper: DistributedDataParallel) -> None:
    """Leave what is frozen out of what processes send each other.

    Every process must have the same parameters frozen. A hook of the user's own, which compresses
    gradients, is left in place: zeros are then sent.
    """
    if not wrapper._comm_hooks:
        wrapper.register_comm_hook(wrapper.process_group, _averaged)


def _averaged(
    group: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean of a bucket over all processes."""
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    trained = [gradient for parameter, gradient in pairs if parameter.requires_grad]
    if not trained:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    whole = len(trained) == len(bucket.parameters())
    packed = bucket.buffer() if whole else torch.cat([gradient.flatten() for gradient in trained])
    packed.div_(dist.get_world_size(group))
    work = dist.all_reduce(packed, group=group, async_op=True)
    assert work is not None

    def unpack(future: Any) -> Tensor:
        reduced: Tensor = future.value()[0]
        if whole:
            return reduced
        parts = torch.split(reduced, [gradient.numel() for gradient in trained])
        for gradient, part in zip(trained, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        buffer: Tensor = bucket.buffer()
        return buffer

    mean: torch.futures.Future[Tensor] = work.get_future().then(unpack)
    return mean
