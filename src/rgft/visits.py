"""Which samples an epoch visits, in which order, with which weight."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from rgft.batch_order import by_length, evened
from rgft.errors import InputError
from rgft.residuals import Ledger
from rgft.sampling import KeepRule, check_skip, find_rule, keep_probability, systematic, weights

ROUNDING = 1e-9  # of a share of epochs
SETTINGS = ("batch_size", "ranks", "seed")  # without which the rest of an epoch is another one


@dataclass(frozen=True, slots=True)
class Draw:
    """One epoch's visits.

    Attributes:
        visits: Numbers of the samples in order, over all processes, int64 `[n]`.
        weights: What a visit of each sample counts, float64 `[N]`; 0 where it is not visited.
        expected: Visits that were expected, the sum of the probabilities.
    """

    visits: Tensor
    weights: Tensor
    expected: float


class VisitSampler(Sampler[int]):
    r"""The visits of each epoch, drawn from a ledger: what is well predicted comes less often.

    Sample i is visited with probability :math:`p_i` (`keep_probability` of the ledger as it is when
    the epoch begins) and has weight :math:`w_i = 1/p_i`, so that
    :math:`E \sum_{\text{visits}} w_i \nabla\ell_i = \sum_i \nabla\ell_i` for any given parameters.
    Call backward on `weighted_loss(losses, sampler.weights[ids], batch_size)`; see there what to
    divide by. What no one has seen is always visited, so the first epoch is a full one.

    Give it to a `DataLoader` as `sampler`, with the same `batch_size`. Each iteration is the next
    epoch. The draw depends on seed, epoch and ledger alone, and is made when the epoch begins or is
    first asked about. With several processes each takes every `ranks`-th visit of one draw: all
    ledgers must be the same (see `Ledger.share`), shares are disjoint and of equal length. Where
    the draw does not divide evenly its first visits are repeated, and the weight of such a sample
    is shared out among its visits, so that the sum stays unbiased.

    Args:
        ledger: Residuals of the training samples.
        batch_size: Samples of a step on one process.
        epochs: Epochs of the run, which may be a fraction.
        skip: How much is skipped, in [0, 1): see `keep_probability`; 0 visits everything.
        rule: A name in `rgft.sampling.RULES`, or a function of residuals and skip.
        full_pass: Share of the run at its end, in [0, 1]; every epoch that reaches into it visits
            everything (Qin et al. 2024 take 0.125). 0 for none.
        over: Tells the share of the run that is over, where its epochs do not: an epoch that begins
            when no more than `full_pass` is left visits everything.
        unbiased: Weights 1 / p; False for 1, which turns training towards hard samples.
        lengths: Length of each sample, `[N]`. Batches then hold samples of like length, because
            padding is compute.
        bucket: With lengths: batches whose samples are sorted among each other.
        seed: Of draws and orders.
        rank: Number of this process.
        ranks: Number of processes.

    Raises:
        InputError: A setting is out of range.

    >>> ledger = Ledger(4)
    >>> sampler = VisitSampler(ledger, batch_size=2, epochs=3, skip=0.5, full_pass=0)
    >>> sorted(sampler)
    [0, 1, 2, 3]
    >>> ledger.update(torch.arange(4), torch.tensor([0.1, 0.1, 5.0, 4.0]))
    >>> visited = sorted(sampler)
    >>> len(visited), visited[1:], sampler.weights[visited].tolist()
    (3, [2, 3], [2.0, 1.0, 1.0])
    """

    def __init__(  # noqa: PLR0913 - all but three have defaults
        self,
        ledger: Ledger,
        *,
        batch_size: int,
        epochs: float,
        skip: float = 0.5,
        rule: str | KeepRule = "below-mean",
        full_pass: float = 0.125,
        over: Callable[[], float] | None = None,
        unbiased: bool = True,
        lengths: Sequence[int] | Tensor | None = None,
        bucket: int = 50,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        for name, value in {"batch_size": batch_size, "bucket": bucket, "ranks": ranks}.items():
            _whole(name, value, 1)
        _whole("seed", seed, 0)
        _whole("rank", rank, 0)
        check_skip(skip)
        find_rule(rule)
        checks = {
            "epochs": (0 < epochs < math.inf, epochs, "a finite number > 0"),
            "full_pass": (0 <= full_pass <= 1, full_pass, "in [0, 1]"),
            "rank": (rank < ranks, rank, f"below ranks, 0 to {ranks - 1}"),
        }
        for name, (holds, given, allowed) in checks.items():
            if not holds:
                raise InputError(f"{name} is {given!r}; allowed: {allowed}")
        if lengths is not None and len(lengths) != len(ledger):
            raise InputError(
                f"there are {len(lengths)} lengths for {len(ledger)} samples; give one for each"
            )
        self.batch_size, self.skip, self.rule = batch_size, skip, rule
        self.unbiased, self.seed, self.rank, self.ranks = unbiased, seed, rank, ranks
        end = epochs * (1 - full_pass)
        self.full_from = math.floor(end + ROUNDING) if full_pass > 0 else math.inf
        self._full_pass, self._over = full_pass, over
        self._ledger, self._bucket = ledger, bucket
        self._size = len(ledger)
        self._lengths = None if lengths is None else torch.as_tensor(lengths).cpu()
        self._epoch, self._begun = 0, False
        self._position = 0  # visits of this process in this epoch that were handed out
        self._draw: Draw | None = None

    @property
    def epoch(self) -> int:
        """The epoch that runs, or ran last; 0 before the first."""
        return self._epoch

    @property
    def weights(self) -> Tensor:
        """Weight of each sample in this epoch, float64 `[N]`; 0 for those not visited."""
        return self._current().weights

    @property
    def expected_visits(self) -> float:
        """Visits expected of this epoch on all processes: the sum of the probabilities."""
        return self._current().expected

    @property
    def visits(self) -> int:
        """Visits that were drawn for this epoch on all processes, repeats included."""
        return len(self._current().visits)

    def __len__(self) -> int:
        """Visits of this process in the whole epoch, also when only its rest is iterated."""
        return self.visits // self.ranks

    def __iter__(self) -> Iterator[int]:
        if self._begun:
            self.set_epoch(self._epoch + 1)
        self._refuse_different_draws()
        self._begun = True
        return self._rest()

    def _rest(self) -> Iterator[int]:
        epoch, mine = self._epoch, self._current().visits[self.rank :: self.ranks]
        for sample in mine[self._position :].tolist():
            if self._epoch == epoch:  # an iterator left over from another epoch counts no more
                self._position += 1
            yield sample

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next to be iterated; one that is drawn already keeps its draw.

        It begins anew, unless `load_state_dict` has just restored a place in it.
        """
        _whole("epoch", epoch, 0)
        if epoch != self._epoch:
            self._epoch, self._draw = epoch, None
            self._position = 0
        elif self._begun:
            self._position = 0
        self._begun = False

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where training is (loads with `weights_only=True`). The ledger has a state of its own.

        Args:
            position: Visits of this process in this epoch that have been trained on. None for as
                many as were handed out; that is more where a `DataLoader` with workers fetches
                ahead, so give it there. 0 where the loop skips them itself, as the Trainer does.

        Raises:
            InputError: The epoch has not that many visits.
        """
        settings = {name: getattr(self, name) for name in SETTINGS} | {"samples": self._size}
        done = self._position if position is None else position
        _whole("position", done, 0)
        if self._draw is None:
            if done > 0:
                raise InputError(f"position is {done}, but epoch {self._epoch} has not begun")
            return {**settings, "epoch": self._epoch, "position": 0}
        if done > len(self):
            raise InputError(f"position is {done}; allowed: 0 to {len(self)}, visits of a process")
        if self._begun and done == len(self):
            return {**settings, "epoch": self._epoch + 1, "position": 0}
        return {
            **settings,
            "epoch": self._epoch,
            "position": done,
            "visits": self._draw.visits.to(torch.int32),
            "weights": self._draw.weights.clone(),
            "expected": self._draw.expected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration is the rest of that epoch.

        Raises:
            InputError: It is of other data, batches, seed or number of processes.
        """
        mine = {name: getattr(self, name) for name in SETTINGS} | {"samples": self._size}
        for name, value in mine.items():
            if state[name] != value:
                raise InputError(
                    f"the saved visits were drawn with {name} {state[name]}, not {value}; resume "
                    "with the same, or start anew"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._begun, self._draw = False, None
        if "visits" in state:
            visits, kept = state["visits"].to("cpu", torch.int64), state["weights"].cpu().clone()
            self._draw = Draw(visits, kept, float(state["expected"]))

    def _current(self) -> Draw:
        """The draw of this epoch, made when it is first asked for."""
        if self._draw is None:
            self._draw = self._drawn()
        return self._draw

    def _drawn(self) -> Draw:
        generator = torch.Generator()
        mixed = np.random.SeedSequence([self.seed, self._epoch]).generate_state(1)
        generator.manual_seed(int(mixed[0]))
        skip = 0.0 if self._visits_all() else self.skip
        p = keep_probability(self._ledger.residual, self._ledger.seen, skip=skip, rule=self.rule)
        order = torch.randperm(len(p), generator=generator)
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        visits = order[systematic(p[order], offset)]
        if self._lengths is not None:
            batch = self.batch_size * self.ranks
            visits = by_length(visits, self._lengths, batch, self._bucket, generator)
        visits = evened(visits, self.ranks)
        times = torch.bincount(visits, minlength=len(p))
        weight = weights(p, self.unbiased) / times.clamp_min(1)
        return Draw(visits, torch.where(times > 0, weight, 0.0), float(p.sum()))

    def _visits_all(self) -> bool:
        """Whether the epoch belongs to the end of the run, where nothing is skipped."""
        if self._over is None:
            return self._epoch >= self.full_from
        return self._full_pass > 0 and self._over() >= 1 - self._full_pass

    def _refuse_different_draws(self) -> None:
        """Each process would train on its share of another draw, and no one would notice."""
        if self.ranks == 1 or not (dist.is_available() and dist.is_initialized()):
            return
        draw = self._current()
        mine = zlib.crc32(draw.visits.numpy().tobytes() + draw.weights.numpy().tobytes())
        sums: list[tuple[int, ...] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, (self._epoch, self._position, mine))
        if len(set(sums)) > 1:
            raise InputError(
                "the processes drew different visits; give every ledger the losses of all "
                "processes (Ledger.share), and every sampler one seed"
            )


class VisitBatches(Sampler[list[int]]):
    """Batches of a sampler's visits, epoch after epoch without end.

    Give it to a `DataLoader` as `batch_sampler`, without workers: the sampler's place is then that
    of the batch that was handed out last. The last batch of an epoch may be short.

    Args:
        sampler: Whose visits they are.

    >>> batches = iter(VisitBatches(VisitSampler(Ledger(5), batch_size=2, epochs=2)))
    >>> [len(next(batches)) for _ in range(6)]
    [2, 2, 1, 2, 2, 1]
    """

    def __init__(self, sampler: VisitSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            visits = iter(self._sampler)
            while batch := list(islice(visits, self._sampler.batch_size)):
                yield batch


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; allowed: a whole number >= {least}")
