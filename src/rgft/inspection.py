"""What a model consists of and what its components cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgft.components import partition
from rgft.costs import CostModel, StepSeconds, calibrate
from rgft.images import ImageInputs
from rgft.models import load_classifier, load_tokenizer, load_writer, modalities, writes_as

ROWS, TOKENS = 32, 64
TIMED = ((ROWS, TOKENS), (8, 64), (8, 16))  # rows and tokens of the batches of a calibration
TIMED_IMAGES = (ROWS, 16, 8)
LABELS = ("0", "1")
Batch = dict[str, Tensor]


def inspect_model(
    model: str,
    granularity: str,
    *,
    seconds: bool = False,
    writes: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row per component: what it is, its parameters, and its cost as shares of full fine-tuning.

    `cost_alone`: only it trains; `cost_down_to`: it and all components at its depth or nearer to
    the output train; `weight_gradient`: its own weight gradients. Each is the FLOPs of a step
    (forward and backward) of 32 texts of 64 tokens, or 32 images, over those of full fine-tuning:
    with a two-class head, or with the head that writes. Encoder-decoders write 64 tokens for 64
    that they read; decoders read and write 64 in all.

    Args:
        model: Folder, hub id or packaged name.
        granularity: How components are cut.
        seconds: Whether to time a few steps on this machine, and add `seconds_alone`,
            `seconds_down_to` and `seconds_full`: what they say that such steps take; and
            `seconds_error`, how far off that is for the steps that were timed (relative).
        writes: Whether it is to write texts, and not to classify.
        clock: Seconds.

    Raises:
        InputError: The model cannot be loaded, does not write, or cannot be split like that.
    """
    if writes:
        loaded, batches = _writer(model)
    elif modalities(model) == ("image",):
        loaded, batches = _image_model(model)
    else:
        loaded, batches = _text_model(model)
    components = partition(loaded, granularity)
    costs = CostModel(loaded)
    graph = costs.graph(**batches[0])
    whole = graph.cost(costs.names)
    full = whole.total
    fit = _timed(loaded, batches, clock) if seconds else None
    rows = []
    for component in components:
        own = {s.parameter for s in component.slices}
        above = {s.parameter for c in components if c.depth >= component.depth for s in c.slices}
        alone, down_to = graph.cost(own), graph.cost(above)
        row = {
            "name": component.name,
            "kind": component.kind,
            "depth": component.depth,
            "numel": component.numel,
            "cost_alone": alone.total / full,
            "cost_down_to": down_to.total / full,
            "weight_gradient": (full - graph.cost(costs.names - own).total) / full,
        }
        if fit is not None:
            row["seconds_alone"] = fit.predict(alone)
            row["seconds_down_to"] = fit.predict(down_to)
            row["seconds_full"] = fit.predict(whole)
            row["seconds_error"] = fit.error
        rows.append(row)
    return rows


def _text_model(model: str) -> tuple[Any, list[Batch]]:
    """A classifier and the batches of a calibration, the one that costs are of first."""
    loaded: Any = load_classifier(model, LABELS, load_tokenizer(model).pad_token_id)
    end = loaded.config.eos_token_id if loaded.config.is_encoder_decoder else 0
    return loaded, [_texts(*shape, end) for shape in TIMED]


def _writer(model: str) -> tuple[Any, list[Batch]]:
    """The same of a model with the head that it was pre-trained with."""
    loaded: Any = load_writer(model, writes_as(model, "--writes"))
    batches = [_texts(*shape, 0) for shape in TIMED]
    return loaded, [{**batch, "labels": batch["input_ids"]} for batch in batches]


def _image_model(model: str) -> tuple[Any, list[Batch]]:
    inputs = ImageInputs(model)
    return inputs.load_model(LABELS), [inputs.blank(rows) for rows in TIMED_IMAGES]


def _texts(rows: int, tokens: int, end: int) -> Batch:
    """Texts that end with `end`: encoder-decoders read them by it."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    ids[:, -1] = end
    labels = torch.zeros(rows, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _timed(model: Any, batches: list[Batch], clock: Callable[[], float]) -> StepSeconds:
    """Where training would run: on the accelerator, if there is one."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    there = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    return calibrate(model, there, clock=clock)
