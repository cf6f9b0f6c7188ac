"""What a model consists of and what its components cost."""

from __future__ import annotations

from typing import Any

import torch

from rgft.components import partition
from rgft.costs import CostModel
from rgft.models import load_classifier, load_tokenizer

ROWS, TOKENS = 32, 64


def inspect_model(model: str, granularity: str) -> list[dict[str, Any]]:
    """A row per component: what it is, its parameters, and its cost as shares of full fine-tuning.

    `cost_alone`: only it trains; `cost_down_to`: it and all components at its depth or nearer to
    the output train; `weight_gradient`: its own weight gradients. Each is the FLOPs of a step
    (forward and backward) of 32 x 64 tokens with a two-class head over those of full fine-tuning.

    Raises:
        InputError: The model cannot be loaded, or not be split like that.
    """
    tokenizer = load_tokenizer(model)
    loaded = load_classifier(model, ("0", "1"), tokenizer.pad_token_id)
    components = partition(loaded, granularity)
    costs = CostModel(loaded)
    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    labels = torch.zeros(ROWS, dtype=torch.long)
    graph = costs.graph(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)
    full = graph.cost(costs.names).total
    rows = []
    for component in components:
        own = {s.parameter for s in component.slices}
        above = {s.parameter for c in components if c.depth >= component.depth for s in c.slices}
        rows.append(
            {
                "name": component.name,
                "kind": component.kind,
                "depth": component.depth,
                "numel": component.numel,
                "cost_alone": graph.cost(own).total / full,
                "cost_down_to": graph.cost(above).total / full,
                "weight_gradient": (full - graph.cost(costs.names - own).total) / full,
            }
        )
    return rows
