"""How well gradients under a bypass agree with exact ones, on MiniLM and TREC.

Every choice of one, two or three of the six layers (or of their attentions, or feed-forwards) is
bypassed in turn, before training and after some steps of it; what is bypassed is frozen, all else
trains. The cosine to the exact gradient over the same rows and dropout is kept for each component,
and the share of the backward FLOPs. For scale, the same cosine between two exact gradients over
different rows, and under other dropout on the same rows.

    python benchmarks/bypass.py --record benchmarks/records/bypass.json
    python benchmarks/bypass.py --kind attention --most 1
    python benchmarks/bypass.py --show benchmarks/records/bypass.json  # as in docs/bypass.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from invocation import invocation
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rgft
from rgft import records
from rgft.atomic import write_text_atomically
from rgft.batches import Collator, tokenize
from rgft.models import load_classifier, load_tokenizer
from rgft.tasks import load_task

Batch = dict[str, Tensor]
Row = dict[str, Any]
ROWS = 32
PREFIX = "encoder.layer."
KINDS = ("layer", "attention", "feed_forward")


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def prepared() -> tuple[nn.Module, Iterator[Batch]]:
    """The model, and batches of the training split without end."""
    task = load_task("trec")
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", task.label_names, tokenizer.pad_token_id).train()
    examples = tokenize(task, "train", tokenizer, 64)
    loader = torch.utils.data.DataLoader(
        examples, ROWS, shuffle=True, drop_last=True, collate_fn=Collator(tokenizer)
    )
    return model, (batch for _ in itertools.count() for batch in loader)


def train(model: nn.Module, batches: Iterator[Batch], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in itertools.islice(batches, steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def backward_flops(model: nn.Module, batch: Batch) -> int:
    """Of the linear maps: the counter does not know the fused attention of CPUs."""
    loss = loss_of(model, batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def choices(layers: Sequence[str], most: int) -> Iterator[tuple[str, ...]]:
    for count in range(1, most + 1):
        yield from itertools.combinations(layers, count)


def measure(model: nn.Module, batches: Sequence[Batch], kind: str, most: int) -> list[Row]:
    """One row for each choice of components of a kind."""
    granularity = "layer" if kind == "layer" else "block"
    components = rgft.partition(model, granularity)
    branches = rgft.residual_branches(model, components, lambda m: m(**batches[0]))
    layers = [c.name for c in components if c.kind == kind]
    frozen = {c.name: [s.parameter for s in c.slices] for c in components}
    full = backward_flops(model, batches[0])
    rows = []
    for chosen in choices(layers, most):
        held = [model.get_parameter(name) for layer in chosen for name in frozen[layer]]
        bypass = rgft.Bypass(model, branches)
        try:
            for parameter in held:
                parameter.requires_grad_(False)
            agreement = rgft.gradient_agreement(model, loss_of, batches, chosen, granularity)
            bypass.set(chosen)
            share = backward_flops(model, batches[0]) / full
        finally:
            bypass.close()
            for parameter in held:
                parameter.requires_grad_(True)
        rows.append(
            {
                "bypassed": [layers.index(layer) for layer in chosen],
                "cosine": agreement.cosine,
                "by_component": agreement.by_component,
                "backward_share": share,
            }
        )
    return rows


def noise(model: nn.Module, batches: Sequence[Batch], others: Sequence[Batch]) -> dict[str, float]:
    """Cosines of the exact gradient to that over other rows, and to that under other dropout."""

    def gradient(of: Sequence[Batch]) -> Tensor:
        losses = (loss_of(model, batch) for batch in of)
        parameters = list(model.parameters())
        grads = [torch.autograd.grad(loss, parameters) for loss in losses]
        return torch.cat([torch.stack(same).sum(0).flatten() for same in zip(*grads, strict=True)])

    exact = gradient(batches)
    return {
        "other_rows": float(torch.cosine_similarity(exact, gradient(others), dim=0)),
        "other_dropout": float(torch.cosine_similarity(exact, gradient(batches), dim=0)),
    }


def table(rows: Sequence[Row], layers: int) -> str:
    """Markdown: the lowest, all and the highest layers, by how many are bypassed."""
    lines = [
        "| bypassed | which | all that trains | layers below | embeddings | backward FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for count in sorted({len(row["bypassed"]) for row in rows}):
        same = [row for row in rows if len(row["bypassed"]) == count]
        lowest, highest = list(range(count)), list(range(layers - count, layers))
        for name, of in (
            ("lowest", [row for row in same if row["bypassed"] == lowest]),
            ("all choices", same),
            ("highest", [row for row in same if row["bypassed"] == highest]),
        ):
            cells = [
                spread([row["cosine"] for row in of]),
                spread([cosine for row in of for cosine in layers_below(row)]),
                spread([row["by_component"]["embeddings"] for row in of]),
                spread([row["backward_share"] for row in of]),
            ]
            lines.append(f"| {count} of {layers} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers_below(row: Row) -> list[float]:
    """Mean cosine of the trained layers, or blocks, under the highest bypassed one, if any."""
    parted = ((name.partition(PREFIX)[2], c) for name, c in row["by_component"].items())
    found = [c for name, c in parted if name and int(name.split(".")[0]) < max(row["bypassed"])]
    return [statistics.mean(found)] if found else []


def spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    mean, lowest, highest = statistics.mean(values), min(values), max(values)
    if f"{lowest:.2f}" == f"{highest:.2f}":
        return f"{mean:.2f}"
    return f"{mean:.2f} ({lowest:.2f} to {highest:.2f})"


def page(results: Sequence[Row]) -> str:
    """Markdown: a table for each look at the model."""
    parts = []
    for look in results:
        rows = look["rows"]
        layers = 1 + max(i for row in rows for i in row["bypassed"])
        known = ", ".join(f"{n.replace('_', ' ')} {c:.2f}" for n, c in look["noise"].items())
        caption = f"After {look['steps']} steps (exact gradients among each other: {known})"
        parts.append(f"{caption}\n\n{table(rows, layers)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of training before the second look")
    parser.add_argument("--batches", type=int, default=4, help="of 32 rows, for each gradient")
    parser.add_argument("--kind", choices=KINDS, default="layer", help="what is bypassed")
    parser.add_argument("--most", type=int, default=3, help="of it bypassed at once")
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--show", type=Path, help="print what is in this file, measure nothing")
    given = parser.parse_args()
    if given.show is not None:
        print(page(json.loads(given.show.read_text(encoding="utf-8"))["results"]))
        return
    torch.manual_seed(0)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    model, batches = prepared()
    looks = []
    for steps in (0, given.steps):
        train(model, batches, steps)
        rows, others = (list(itertools.islice(batches, given.batches)) for _ in range(2))
        reference = noise(model, rows, others)
        measured = measure(model, rows, given.kind, given.most)
        looks.append({"steps": steps, "noise": reference, "rows": measured})
        print(page(looks[-1:]), flush=True)
    if given.record is not None:
        record = {
            "started": started,
            "command": invocation(__file__, "--record"),
            "results": looks,
        }
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
