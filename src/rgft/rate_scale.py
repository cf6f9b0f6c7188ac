r"""What a learning rate that was found on one model is worth on another.

The rates of methods were found on a transformer of width 384. Under Adam an update of a matrix
moves its outputs in proportion to the width of its inputs, so that the rate has to fall with it
(Yang et al. 2022, "Tensor Programs V"):

.. math:: \eta = \eta_{384} \min(1, 384 / \text{width})

A network with batch normalization does not care how large its weights are, and takes larger rates.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

WIDTH = 384
BATCH_NORMALIZED = 8.0  # measured on EfficientNet-Lite0: docs/decisions/0018


def rate_scale(model: nn.Module) -> float:
    """What to multiply the learning rate by for `model`.

    >>> rate_scale(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    8.0
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> shape = dict(num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> rate_scale(BertForSequenceClassification(BertConfig(hidden_size=768, **shape)))
    0.5
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return BATCH_NORMALIZED
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(inner, "hidden_size", None)
    return min(1.0, WIDTH / width) if isinstance(width, int) else 1.0
