"""A model writes texts: greedily or by beam search, for a bounded number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from rgft.processes import Processes
from rgft.text_to_text import TextToTextInputs

OWN = ("decoder_start_token_id", "bos_token_id", "forced_bos_token_id", "forced_eos_token_id")
Row = Mapping[str, Any]
Item = TypeVar("Item")


def spread(examples: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the examples, evenly over their order (of texts: from short to long).

    >>> [row["i"] for row in spread([{"i": i} for i in range(9)], 3)]
    [0, 4, 8]
    """
    if count >= len(examples):
        return list(examples)
    return [examples[i] for i in np.linspace(0, len(examples) - 1, count).round().astype(int)]


def write(
    model: Any,
    inputs: TextToTextInputs,
    examples: Sequence[Row],
    processes: Processes | None = None,
) -> list[str]:
    """What the model writes for each example.

    Nothing is drawn at random, and of the settings that lie beside a model's weights only the
    tokens that it starts with, or forces at the start or the end, have a part in it: texts are the
    most probable ones of those that the search meets.

    Args:
        model: In any mode, which it keeps.
        inputs: Makes its batches, and says how to search.
        examples: As `inputs` has made them.
        processes: Those that share the batches among them; all get all texts.
    """
    batches = [
        examples[i : i + inputs.evaluation_batch]
        for i in range(0, len(examples), inputs.evaluation_batch)
    ]
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    written: list[list[str]] = []
    with torch.no_grad(), _searching(model, inputs) as search:
        for batch in batches[rank::size]:
            questions = {k: v.to(device) for k, v in inputs.questions(batch).items()}
            tokens = model.generate(**questions, generation_config=search)
            written.append(inputs.written(tokens.cpu(), questions))
    model.train(mode)
    if processes is None:
        return [text for texts in written for text in texts]
    return _in_order(processes.lists([t for texts in written for t in texts]), batches, size)


def _in_order(gathered: Sequence[str], batches: Sequence[Sequence[Row]], size: int) -> list[str]:
    """Texts of process 0, then of process 1, and so on, in the order of their batches."""
    order = [i for rank in range(size) for i in range(rank, len(batches), size)]
    texts: dict[int, Sequence[str]] = {}
    start = 0
    for i in order:
        texts[i] = gathered[start : start + len(batches[i])]
        start += len(batches[i])
    return [text for i in range(len(batches)) for text in texts[i]]


@contextmanager
def _searching(model: Any, inputs: TextToTextInputs) -> Iterator[Any]:
    """How to search. It is the model's own way, too, for that long: `generate` asks both."""
    from transformers import GenerationConfig, GenerationMixin  # noqa: PLC0415 - slow to import

    writer: Any = next(m for m in model.modules() if isinstance(m, GenerationMixin))
    own = writer.generation_config
    search = GenerationConfig(
        max_new_tokens=inputs.writing.answer,
        num_beams=inputs.writing.beams,
        do_sample=False,
        pad_token_id=inputs.processor.pad_token_id,
        eos_token_id=inputs.processor.eos_token_id,
        **{name: getattr(own, name) for name in OWN},
    )
    writer.generation_config = search
    try:
        yield search
    finally:
        writer.generation_config = own
