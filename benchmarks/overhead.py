"""What the guide itself costs: on a MiniLM step, and against the number of components.

Steps with and without a guide alternate in blocks in one process, so that noise of the machine
falls on both; printed are medians and their ratio.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import rgft
from rgft.models import load_classifier, load_tokenizer

BATCH, TOKENS = 32, 64


def timed(step: Callable[[], None], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def alternate(
    model: nn.Module,
    step: Callable[[torch.optim.Optimizer], None],
    config: rgft.Config,
    rounds: int,
    block: int,
) -> tuple[float, float, float]:
    """Median seconds of a step without and with the guide, and the guide's own seconds a step."""
    plain, guided, own = [], [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step(optimizer)
    for _ in range(rounds):
        plain += timed(lambda: step(optimizer), block)
        guide = rgft.Guide(model, optimizer, config)
        step(optimizer)  # the first step after a plan also pays for the engagement check
        before = guide.seconds
        guided += timed(lambda: step(optimizer), block)
        own.append((guide.seconds - before) / block)
        guide.close()
    return statistics.median(plain), statistics.median(guided), statistics.median(own)


def minilm(rounds: int) -> None:
    """A step of 32 x 64 tokens, scored every step, decided every 10."""
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", ("0", "1"), tokenizer.pad_token_id)
    tokens = torch.randint(1000, 20000, (BATCH, TOKENS))
    labels = torch.zeros(BATCH, dtype=torch.long)

    def step(optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for granularity in ("layer", "head"):
        plain, guided, own = alternate(
            model, step, rgft.Config(granularity=granularity), rounds, 10
        )
        count = len(rgft.partition(model, granularity))
        print(
            f"MiniLM, {granularity}, {count} components: step {plain:.3f} s, guided {guided:.3f} s "
            f"(ratio {guided / plain:.3f}), guide's own {own * 1e3:.1f} ms = {own / plain:.2%}",
            flush=True,
        )


def components(rounds: int) -> None:
    """The same 5 million parameters in more and more components."""
    for count in (10, 100, 1000, 5000):
        width = 5_000_000 // count
        model = nn.ParameterDict({str(i): nn.Parameter(torch.randn(width)) for i in range(count)})
        parameters = list(model.values())

        def step(
            optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter] = parameters
        ) -> None:
            for parameter in parameters:
                parameter.grad = parameter.detach() * 0.1
            optimizer.step()

        plain, guided, own = alternate(
            model, step, rgft.Config(granularity="parameter"), rounds, 10
        )
        print(
            f"{count} components of {width:,} parameters: optimizer step {plain * 1e3:.1f} ms, "
            f"guided {guided * 1e3:.1f} ms, guide's own {own * 1e3:.1f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    minilm(given.rounds)
    components(given.rounds)


if __name__ == "__main__":
    main()
