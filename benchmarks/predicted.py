"""Whether costs are known before a step: predicted FLOPs of plans against those counted.

For each plan the price of a step is computed from a trace without values (`rgft.CostModel`); then
the plan is carried out on the real model, and one step (forward, backward, AdamW) is counted by
PyTorch's own counter (see `counting`). Plans: suffixes, single components, random sets, of
parameters too, embeddings and heads alone, bypassed layers, cached prefixes, LoRA pairs.

    python benchmarks/predicted.py --record benchmarks/records/predicted.json
    python benchmarks/predicted.py --show benchmarks/records/predicted.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from budgets import Batch, Setup, decoder, encoder, loss_of, vision
from counting import Counter
from invocation import invocation
from torch import nn

import rgft
from rgft import Component, CostModel, records
from rgft.adapters.pairs import add_lora
from rgft.atomic import write_text_atomically
from rgft.costs import Action
from rgft.execution.prefix_cache import PrefixCache

ALLOWED = 0.03
DRAWS = 4  # random sets of components, and of parameters, a model
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step does.

    Attributes:
        what: For the table.
        trained: Parameters that train.
        bypassed: Components whose branches pass no gradient.
        cached: Layers of the prefix that do not run.
    """

    what: str
    trained: frozenset[str]
    bypassed: tuple[str, ...] = ()
    cached: int = 0


def named(components: Collection[Component]) -> frozenset[str]:
    """The parameters of some components."""
    return frozenset(part.parameter for c in components for part in c.slices)


def choices(components: Sequence[Component]) -> Iterator[Plan]:
    """Plans that only choose what trains."""
    depths = sorted({c.depth for c in components})
    everything = named(components)
    yield Plan("all", everything)
    for low in depths[1:]:
        above = [c for c in components if c.depth >= low]
        yield Plan(f"suffix from depth {low}", named(above))
    for c in (components[0], components[len(components) // 2]):
        yield Plan(f"{c.name} alone", named([c]))
    yield Plan("lowest and head", named([components[0], components[-1]]))
    draw = random.Random(0)
    for _ in range(DRAWS):
        some = draw.sample(components, draw.randint(1, len(components) - 1))
        yield Plan(f"random {len(some)} of {len(components)} components", named(some))
    names = sorted(everything)
    for _ in range(DRAWS):
        drawn = draw.sample(names, draw.randint(1, len(names) - 1))
        yield Plan(f"random {len(drawn)} of {len(names)} parameters", frozenset(drawn))


def bypasses(components: Sequence[Component]) -> Iterator[Plan]:
    """Plans that bypass layers: the lowest, the highest, and every other one."""
    layers = [c for c in components if c.kind == "layer"]
    for what, held in (
        ("lowest layer", layers[:1]),
        ("highest two layers", layers[-2:]),
        ("every other layer", layers[::2]),
    ):
        rest = [c for c in components if c not in held]
        yield Plan(f"{what} bypassed", named(rest), tuple(c.name for c in held))


def cached(components: Sequence[Component]) -> Iterator[Plan]:
    """Plans whose deepest layers are frozen and do not run."""
    layers = [c for c in components if c.kind == "layer"]
    for boundary in (1, len(layers) // 2, len(layers) - 1):
        above = [c for c in components if c.depth > layers[boundary - 1].depth]
        yield Plan(f"first {boundary} layers cached", named(above), cached=boundary)
        yield Plan(f"first {boundary} cached, head trains", named(above[-1:]), cached=boundary)


def counted(
    model: nn.Module, batch: Batch, plan: Plan, branches: rgft.ResidualBranches | None
) -> int:
    """FLOPs of one step that carries out the plan."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in plan.trained)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0)
    with ExitStack() as stack:
        if plan.bypassed:
            assert branches is not None
            stack.enter_context(closing(rgft.Bypass(model, branches))).set(plan.bypassed)
        if plan.cached:
            cache = stack.enter_context(PrefixCache(model))
            cache.set_boundary(plan.cached)
            batch = {**batch, "sample_ids": list(range(len(batch["labels"])))}
            loss_of(model, batch)  # fills the cache, and has it checked
        counter = Counter()
        with counter:
            loss_of(model, batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    return counter.total


def compare(setup: Setup, plans: Sequence[Plan], model: nn.Module) -> Iterator[Row]:
    """A row for each plan."""
    batch = setup.batches[0]
    components = rgft.partition(model, "layer")
    branches = None
    if any(plan.bypassed for plan in plans):
        branches = rgft.residual_branches(model, components, lambda m: m(**batch))
    layers = [c.name for c in components if c.kind == "layer"]
    inputs = batch if not setup.what.startswith("EfficientNet") else None
    costs = CostModel(model)
    for plan in plans:
        started = time.perf_counter()
        graph = costs.graph(**inputs) if inputs else costs.graph(batch["pixel_values"])
        detached = branches.of(plan.bypassed) if branches is not None else ()
        skipped = frozenset(layers[: plan.cached])
        action = Action(plan.trained, frozenset(detached), skipped)
        predicted = costs.step(graph, action).total
        seconds = time.perf_counter() - started
        seen = counted(model, batch, plan, branches)
        row = {
            "model": setup.what,
            "plan": plan.what,
            "predicted": predicted,
            "counted": seen,
            "deviation": predicted / seen - 1,
            "seconds": seconds,
        }
        print(f"{setup.what}, {plan.what}: {seen:.4g}, {row['deviation']:+.4%}", flush=True)
        yield row


def all_rows() -> Iterator[Row]:
    """Rows of all models."""
    for setup in (encoder(32), decoder(16), *vision(16)):
        model = setup.build().train()
        components = rgft.partition(model, "layer")
        plans = list(choices(components))
        if "EfficientNet" not in setup.what:  # its layers are of many shapes; not all add to a skip
            plans += [*bypasses(components), *cached(components)]
        name = setup.what.split(" (")[-1].split(",")[0]
        yield from compare(replace(setup, what=name), plans, model)
    setup = encoder(32)
    lora = add_lora(setup.build(), 8).train()
    pairs = rgft.partition(lora, "lora")
    trainable = {n for n, p in lora.named_parameters() if p.requires_grad}
    adapted = [c for c in pairs if named([c]) <= trainable]
    yield from compare(replace(setup, what="MiniLM with LoRA"), list(choices(adapted)), lora)


def page(rows: Sequence[Row]) -> str:
    """Markdown: by model how many plans, their range of costs, and the worst deviation."""
    lines = [
        "| model | plans | counted FLOPs, least to most | worst deviation | exact |",
        "|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        same = [row for row in rows if row["model"] == model]
        seen = [row["counted"] for row in same]
        worst = max((row["deviation"] for row in same), key=abs)
        exact = sum(row["predicted"] == row["counted"] for row in same)
        lines.append(
            f"| {model} | {len(same)} | {min(seen):.3g} to {max(seen):.3g} | {worst:+.4%} "
            f"| {exact} |"
        )
    within = sum(abs(row["deviation"]) <= ALLOWED for row in rows)
    return "\n".join([*lines, "", f"{within} of {len(rows)} plans within {ALLOWED:.0%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--show", type=Path, help="print what is in this file, run nothing")
    given = parser.parse_args()
    if given.show is not None:
        print(page(json.loads(given.show.read_text(encoding="utf-8"))["results"]))
        return
    torch.manual_seed(0)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = list(all_rows())
    print("\n" + page(rows))
    if given.record is not None:
        record = {
            "started": started,
            "command": invocation(__file__, "--record"),
            "results": rows,
        }
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
