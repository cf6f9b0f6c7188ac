"""What many processes that train one model have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rgft.errors import InputError


class Processes:
    """The processes of a group. Every method has to be called by all of them, in the same order.

    Args:
        group: The group; None for all processes.

    Attributes:
        rank: Number of this process in the group.
        size: Number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        # not dist.group.WORLD: who holds a group keeps its threads from ending before Python does
        self._group = group
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        # numbers that are on the host stay there: no one waits for a device
        self._host = self._group
        if dist.get_backend(self._group) != dist.Backend.GLOO:
            ranks = dist.get_process_group_ranks(self._group)
            self._host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, by rank: `[R, ...]`, on their device."""
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(rows, tensor.contiguous(), group=self._group)
        return torch.stack(rows)

    def greatest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all processes, on the device."""
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor

    def of_first(self, tensor: Tensor) -> Tensor:
        """What process 0 has, a tensor on the host: how a decision is the same everywhere."""
        tensor = tensor.clone()
        dist.broadcast(tensor, group=self._host, group_src=0)
        return tensor

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums of whole numbers over all processes."""
        joined = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(joined, group=self._host)
        return [int(count) for count in joined]

    def joined(self, rows: Tensor) -> Tensor:
        """Columns of all processes, `[K, n]` each, side by side by rank; n may differ."""
        count = torch.tensor([rows.shape[1]])
        counts = [torch.empty_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count, group=self._host)
        padded = rows.new_zeros((rows.shape[0], max(int(n) for n in counts)))
        padded[:, : rows.shape[1]] = rows
        parts = zip(self.gathered(padded), counts, strict=True)
        return torch.cat([part[:, : int(n)] for part, n in parts], dim=1)

    def wait(self) -> None:
        """Until all have come this far."""
        dist.barrier(group=self._host)

    def lists(self, texts: Sequence[str]) -> list[str]:
        """The texts of all processes, one list after the other."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(texts), group=self._host)
        return [str(text) for there in found for text in there]

    def refuse_different(self, what: str, text: str) -> None:
        """Refuse, in all processes alike, what is not the same in all of them.

        Raises:
            InputError: It is not.
        """
        found = self.lists([text])
        other = next((rank for rank, there in enumerate(found) if there != found[0]), None)
        if other is not None:
            raise InputError(
                f"process {other} has another {what} than process 0 ({found[other]}, not "
                f"{found[0]}); give every process the same"
            )
