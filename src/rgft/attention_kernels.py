"""Which kernel computes attention in a run.

On a CPU PyTorch's flash attention in bfloat16 takes longer on short sequences than the products
written out: forward and backward 12 times as long for 16 positions, 1.9 to 2.9 times for 64, 1.2 to
1.8 times for 128, and less from 192 on (PyTorch 2.13, a processor with products in bfloat16;
benchmarks/LOG.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 128  # positions


def attention_kernels(precision: str, positions: int | None) -> AbstractContextManager[None]:
    """A block in which attention is computed by products, where flash attention takes longer.

    Args:
        precision: Of products: "float32" or "bfloat16".
        positions: Of the longest sequence; None if they are not tokens.
    """
    short = positions is not None and positions <= SHORT
    if short and precision == "bfloat16" and not torch.accelerator.is_available():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
