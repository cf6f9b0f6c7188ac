"""What the guide itself costs: on a MiniLM step, and against the number of components.

Blocks of steps with and without a guide alternate in one process, so that noise of the machine
falls on both. A block is whole decision windows from the guide's first step on: the engagement
check, the scores, the decisions and the host's waits for them all count. Printed are ratios of mean
seconds a step, of the clock on the wall and of this process's CPU time, which other processes
disturb less.

    python benchmarks/overhead.py --record benchmarks/records/overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from invocation import invocation
from torch import nn

import rgft
from rgft import records
from rgft.atomic import write_text_atomically
from rgft.models import load_classifier, load_tokenizer

BATCH, TOKENS = 32, 64
PARAMETERS = 5_000_000
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Seconds = dict[str, float]
Step = Callable[[torch.optim.Optimizer], None]


def timed(step: Step, optimizer: torch.optim.Optimizer, count: int) -> Seconds:
    """Mean seconds of `count` calls, by clock."""
    started = {name: clock() for name, clock in CLOCKS.items()}
    for _ in range(count):
        step(optimizer)
    return {name: (clock() - started[name]) / count for name, clock in CLOCKS.items()}


def compare(
    model: nn.Module, step: Step, config: rgft.Config, rounds: int, windows: int
) -> dict[str, Any]:
    """Mean seconds a step without and with the guide, their ratio, and the guide's own seconds."""
    count = windows * config.every
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step(optimizer)
    plain, guided, own = [], [], []
    for _ in range(rounds):
        plain.append(timed(step, optimizer, count))
        guide = rgft.Guide(model, optimizer, config)
        guided.append(timed(step, optimizer, count))
        own.append(guide.seconds / count)
        guide.close()
    means = {
        name: {clock: statistics.mean(block[clock] for block in blocks) for clock in CLOCKS}
        for name, blocks in (("plain", plain), ("guided", guided))
    }
    return {
        "granularity": config.granularity,
        "components": len(guide.components),
        "steps": rounds * count,
        **means,
        "ratio": {clock: means["guided"][clock] / means["plain"][clock] for clock in CLOCKS},
        "ratio_by_round": [
            {clock: g[clock] / p[clock] for clock in CLOCKS}
            for p, g in zip(plain, guided, strict=True)
        ],
        "guide_seconds": statistics.mean(own),
        "guide_share": statistics.mean(own) / means["plain"]["wall"],
    }


def show(what: str, row: dict[str, Any]) -> dict[str, Any]:
    """Print a line of results; returns it with its name."""
    ratio = row["ratio"]
    print(
        f"{what}, {row['granularity']}, {row['components']} components, {row['steps']} steps: "
        f"step {row['plain']['wall'] * 1e3:.1f} ms, guided {row['guided']['wall'] * 1e3:.1f} ms "
        f"(ratio {ratio['wall']:.3f}; of CPU time {ratio['cpu']:.3f}), "
        f"guide's own {row['guide_seconds'] * 1e3:.1f} ms = {row['guide_share']:.2%}",
        flush=True,
    )
    return {"what": what, **row}


def minilm(rounds: int, windows: int) -> list[dict[str, Any]]:
    """A step of 32 x 64 tokens, scored every step, decided every 10."""
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", ("0", "1"), tokenizer.pad_token_id)
    tokens = torch.randint(1000, 20000, (BATCH, TOKENS))
    labels = torch.zeros(BATCH, dtype=torch.long)

    def step(optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    configs = [rgft.Config(granularity=name) for name in ("layer", "head")]
    return [show("MiniLM", compare(model, step, c, rounds, windows)) for c in configs]


def optimizer_steps(rounds: int, windows: int, count: int) -> dict[str, Any]:
    """An optimizer step alone, of the same 5 million parameters in `count` components."""
    width = PARAMETERS // count
    model = nn.ParameterDict({str(i): nn.Parameter(torch.randn(width)) for i in range(count)})
    gradients = [(p, p.detach() * 0.1) for p in model.values()]

    def step(optimizer: torch.optim.Optimizer) -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient.clone()
        optimizer.step()

    config = rgft.Config(granularity="parameter")
    return show("optimizer step", compare(model, step, config, rounds, windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=3, help="decision windows a block")
    parser.add_argument("--components", type=int, nargs="*", default=[10, 100, 1000, 5000])
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    given = parser.parse_args()
    torch.manual_seed(0)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results = minilm(given.rounds, given.windows)
    results += [optimizer_steps(given.rounds, given.windows, n) for n in given.components]
    if given.record is not None:
        record = {
            "started": started,
            "command": invocation(__file__, "--record"),
            "results": results,
        }
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
