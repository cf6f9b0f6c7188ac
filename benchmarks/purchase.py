"""The policy "purchase": whether its choice is the best there is, and how long it takes.

Exact: random problems of up to 14 components against all of their sets. The work that components
share is that of a chain of layers, or any work at all. Time: chains of 10 to 1,000 layers, values
and weights at random, several allowances; CPU time of this process, the least of three calls.

    python benchmarks/purchase.py --record benchmarks/records/purchase.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from invocation import invocation

from rgft import records
from rgft.atomic import write_text_atomically
from rgft.costs import ComponentCosts
from rgft.policies.purchase import purchase

ALLOWANCES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of a full step
REPEATS = 3
ROUNDING = 1e-9  # relative


class Problem(NamedTuple):
    """Arguments of `purchase`."""

    values: list[float]
    costs: ComponentCosts
    allowance: float
    always: frozenset[int]


def chain(count: int, draw: random.Random) -> ComponentCosts:
    """Layers in a row: each has weight gradients, and all below need its input gradient."""
    backward = {1 << i: draw.choice([4.0, 8.0, draw.random() * 8]) for i in range(count)}
    for i in range(1, count):
        below = (1 << i) - 1
        backward[below] = backward.get(below, 0.0) + draw.choice([4.0, 8.0])
    return ComponentCosts(count, 8.0 * count, backward)


def anything(count: int, draw: random.Random) -> ComponentCosts:
    """Work that any sets of components share."""
    pieces = {
        draw.randrange(1, 2**count): draw.choice([0, 3, draw.random() * 9]) for _ in range(14)
    }
    return ComponentCosts(count, draw.random() * 9, pieces)


def problems(count: int, seed: int) -> Iterator[Problem]:
    """Random problems of up to 14 components, every other one a chain."""
    draw = random.Random(seed)
    for i in range(count):
        size = draw.randint(1, 14)
        costs = (chain, anything)[i % 2](size, draw)
        values = [draw.choice([draw.random(), 1.0, 0.0]) for _ in range(size)]
        always = frozenset(draw.sample(range(size), draw.randint(0, min(2, size))))
        yield Problem(values, costs, draw.uniform(0.2, 1.0) * costs.full, always)


def by_brute_force(problem: Problem) -> float:
    """The most value of any affordable set, by looking at them all."""
    values, costs, allowance, always = problem
    sets = np.arange(2**costs.components)
    held = sum(1 << i for i in always)
    sets = sets[sets & held == held]
    price = np.full(len(sets), float(costs.forward))
    for owners, flops in costs.backward.items():
        price += flops * (sets & owners != 0)
    free = [(i, value) for i, value in enumerate(values) if i not in always]
    worth = sum((value * (sets >> i & 1) for i, value in free), np.zeros(len(sets)))
    affordable = worth[price <= allowance * (1 + 1e-12)]
    return float(affordable.max(initial=0.0))


def exact(count: int) -> dict[str, Any]:
    """How many of `count` problems are solved as well as by brute force."""
    same = kept = 0
    for problem in problems(count, seed=0):
        chosen = purchase(*problem)
        gained = sum(problem.values[i] for i in chosen - problem.always)
        best = by_brute_force(problem)
        same += abs(gained - best) <= ROUNDING * max(best, 1.0)
        price = problem.costs.cost(chosen)
        kept += chosen == problem.always or price <= problem.allowance * (1 + ROUNDING)
    print(f"{same} of {count} problems solved as well as by brute force, {kept} within allowance")
    return {"problems": count, "equal": same, "within_allowance": kept}


def timed(problem: Problem) -> float:
    """Seconds of CPU time, the least of some calls."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        purchase(*problem)
        seconds.append(time.process_time() - started)
    return min(seconds)


def speed(count: int, draws: int) -> dict[str, Any]:
    """Milliseconds for `count` components, over random chains and allowances."""
    found = []
    for seed in range(draws):
        draw = random.Random(seed)
        costs = chain(count, draw)
        values = [draw.random() for _ in range(count)]
        for share in ALLOWANCES:
            problem = Problem(values, costs, share * costs.full, frozenset({count - 1}))
            found.append(1e3 * timed(problem))
    row = {
        "components": count,
        "problems": len(found),
        "median_ms": statistics.median(found),
        "least_ms": min(found),
        "most_ms": max(found),
    }
    print(
        f"{count} components: median {row['median_ms']:.2f} ms, "
        f"{row['least_ms']:.2f} to {row['most_ms']:.2f} over {len(found)} problems",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=2000, help="against brute force")
    parser.add_argument("--components", type=int, nargs="*", default=[10, 100, 300, 1000])
    parser.add_argument("--draws", type=int, default=20, help="random chains of each size")
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    given = parser.parse_args()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    against = exact(given.problems)
    times = [speed(count, given.draws) for count in given.components]
    if given.record is not None:
        record = {
            "started": started,
            "command": invocation(__file__, "--record"),
            "exact": against,
            "times": times,
        }
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
