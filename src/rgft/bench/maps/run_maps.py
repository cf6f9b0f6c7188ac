"""The error maps that results hold, and which of their components can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rgft.bench.results import Problem, Result

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEAST_COMPONENTS = 4  # fewer have too few orders to tell two maps apart
EARLY = 0.1  # of the run
EARLY_AT_MOST = 0.15  # a map that was recorded later than this is no early one


@dataclass(frozen=True, slots=True)
class RunMap:
    """The error map of one run.

    Attributes:
        problem: What it was trained on.
        arm: Its arm.
        budget: Its budget.
        seed: Its seed.
        end: Component -> E at the end of the run; those alone that were ever scored.
        depths: Component -> its position in the forward pass.
        early: The same after a tenth of it; None where that was not recorded.
    """

    problem: Problem
    arm: str
    budget: float | str
    seed: int
    end: Mapping[str, float]
    depths: Mapping[str, int]
    early: Mapping[str, float] | None


def run_maps(found: Iterable[Result]) -> list[RunMap]:
    """The maps of all runs at the chosen rates that have one."""
    told = []
    for result in found:
        for seed, run in sorted(result.runs.items()):
            recorded = run.get("error_map")
            if recorded:
                points = [_scored(recorded["components"], row) for row in recorded["error"]]
                soon = recorded["course"][0] <= EARLY_AT_MOST and len(points) > 1
                early = points[0] if soon else None
                depths = dict(zip(recorded["components"], recorded["depths"], strict=True))
                place = (result.problem, result.arm, result.budget, seed)
                told.append(RunMap(*place, points[-1], depths, early))
    return told


def _scored(names: Sequence[str], row: Sequence[float | None]) -> dict[str, float]:
    """A component that was frozen from the start has no score, and 0 or nothing in its place."""
    return {name: value for name, value in zip(names, row, strict=True) if value}


def aligned(maps: Sequence[Mapping[str, float]]) -> Floats:
    """Values of the components that all maps have, `[maps, components]`."""
    names = [name for name in maps[0] if all(name in one for one in maps)]
    return np.array([[one[name] for name in names] for one in maps], dtype=np.float64)


def profile(maps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    r"""What maps have in common: the geometric mean of their shares, of components in all of them.

    $$ P_k = \exp\left(\frac{1}{M} \sum_m \log \frac{E_{m,k}}{\sum_j E_{m,j}}\right) $$

    >>> profile([{"a": 1.0, "b": 1.0}, {"a": 4.0, "b": 1.0}])["a"].__round__(3)
    0.632
    """
    names = [name for name in maps[0] if all(name in one for one in maps)]
    values = aligned(maps)
    shares = values / values.sum(axis=1, keepdims=True)
    return dict(zip(names, np.exp(np.log(shares).mean(axis=0)).tolist(), strict=True))
