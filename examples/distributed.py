"""Several processes train one model, each on its rows, and stop at half of full fine-tuning's cost.

torchrun --nproc-per-node 2 examples/distributed.py [--sharded]
accelerate launch --multi_gpu --num_processes 2 examples/distributed.py [--sharded]
"""

from __future__ import annotations

import gc
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rgft import Budget, Config, FlopMeter, Guide, Spending

EPOCHS, ROWS, BATCH = 4, 256, 32


def main(*, sharded: bool) -> None:
    """Train on a made-up task."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(4)]
    model = nn.Sequential(*hidden, nn.Linear(32, 1)).to(device)
    inputs = torch.randn(ROWS, 32).to(device)
    targets = inputs[:, :4].prod(1, keepdim=True)

    wrapped: nn.Module
    if sharded:
        for layer in hidden:
            fully_shard(layer)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after sharding
    batches = EPOCHS * ROWS // BATCH
    spending = Spending(FlopMeter(model), Budget(share=0.5), batches=batches)
    guide = Guide(wrapped, optimizer, Config(policy="top", top=0.4, every=4), spending=spending)
    while not spending.finished:
        order = torch.randperm(ROWS)[:BATCH][rank::size]  # the same draw in all processes
        loss = (wrapped(inputs[order]) - targets[order]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spending.step()
    guide.close()
    if rank == 0:
        names = [c.name for c, on in zip(guide.components, guide.plan.trained, strict=True) if on]
        print(f"{guide.step} steps, {spending.progress:.0%} of the budget, at last: {names}")


if __name__ == "__main__":
    main(sharded="--sharded" in sys.argv)
    dist.destroy_process_group()
    gc.collect()  # ends its threads, with what still holds it in cycles of references
