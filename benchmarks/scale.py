"""What a run spends outside the model, by the number of samples.

Measured in isolation, and set against a MiniLM step (forward, backward, AdamW) of 16 x 16 tokens:
`Ledger.update`; the draw of an epoch by `VisitSampler`, over the steps of that epoch; the prefix
cache's bookkeeping (reading the batch, storing 16 samples of 16 x 384 numbers, or finding 16 drawn
at random), with a store that is larger than its memory, so that most of it is in a file; and the
guide, which no number of samples changes. Seconds are of CPU time, which other processes disturb
less; for the cache also those on the wall, since it waits for the disk.

    python benchmarks/scale.py --record benchmarks/records/scale.json
    python benchmarks/scale.py --show benchmarks/records/scale.json  # as in docs/budget.md
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from invocation import invocation
from torch import Tensor

import rgft
from rgft import records
from rgft.atomic import write_text_atomically
from rgft.execution.prefix_batch import Samples, read_samples
from rgft.execution.stored_samples import Storage, StoredSamples
from rgft.models import load_classifier, load_tokenizer
from rgft.visits import VisitSampler

BATCH, TOKENS, WIDTH = 16, 16, 384
BUCKET, SKIP = 16, 0.3
STEPS, FINDS, DRAWS = 40, 300, 3
MOST_MEMORY = 64 * 2**20
Row = dict[str, Any]


def seconds(action: Callable[[Any], Any], over: Iterable[Any]) -> tuple[float, float]:
    """Mean seconds of CPU and on the wall for each of some items."""
    items = list(over)
    cpu, wall = time.process_time(), time.perf_counter()
    for item in items:
        action(item)
    return (time.process_time() - cpu) / len(items), (time.perf_counter() - wall) / len(items)


def step_seconds() -> Row:
    """A step of the model, and the guide's own part of it."""
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", ("0", "1"), tokenizer.pad_token_id).train()
    tokens = torch.randint(1000, 20000, (BATCH, TOKENS))
    labels = torch.zeros(BATCH, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(_: int) -> None:
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    cpu, wall = seconds(step, range(STEPS))
    guide = rgft.Guide(model, optimizer, rgft.Config())
    for i in range(STEPS):
        step(i)
    own = guide.seconds / STEPS
    guide.close()
    return {"step": cpu, "step_wall": wall, "guide": own}


def ledger_seconds(samples: int) -> tuple[rgft.Ledger, float]:
    """A ledger that has seen every sample, and what an update of it takes, flushes included."""
    ledger = rgft.Ledger(samples)
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(samples)
    ledger.update(every, torch.rand(samples, generator=generator))
    ledger.flush()
    batches = [
        (torch.randint(samples, (BATCH,), generator=generator), torch.rand(BATCH))
        for _ in range(20 * ledger.every)
    ]
    cpu, _ = seconds(lambda batch: ledger.update(*batch), batches)
    return ledger, cpu


def draw_seconds(ledger: rgft.Ledger) -> float:
    """Drawing an epoch and handing it out, for each of its steps."""
    lengths = torch.randint(4, 40, (len(ledger),), generator=torch.Generator().manual_seed(1))
    sampler = VisitSampler(
        ledger, batch_size=BATCH, epochs=99, skip=SKIP, lengths=lengths, bucket=BUCKET
    )
    steps = 0

    def epoch(_: int) -> None:
        nonlocal steps
        steps += sum(1 for _ in sampler) / BATCH

    cpu, _ = seconds(epoch, range(DRAWS))
    return cpu * DRAWS / steps


def cache_seconds(samples: int) -> Row:
    """Storing every sample once, then finding some in batches drawn anew."""
    size = samples * TOKENS * WIDTH * 4
    memory = min(size // 4, MOST_MEMORY)
    stored = StoredSamples(Storage(memory_bytes=memory))
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    exact: list[bool] = []

    def look(ids: Tensor) -> tuple[Samples, Tensor]:
        tokens = (ids[:, None] * 31 + torch.arange(TOKENS)) % 29989 + 1
        given = {"input_ids": tokens, "attention_mask": mask[: len(ids)]}
        return read_samples(ids, given, "input_ids"), tokens

    def output(tokens: Tensor) -> Tensor:
        return tokens[..., None].float().expand(-1, -1, WIDTH)

    def keep(ids: Tensor) -> None:
        batch, tokens = look(ids)
        stored.usable(batch, "none")
        rows = dict(enumerate(output(tokens)))
        stored.keep(batch, rows, 3, "none")

    def find(ids: Tensor) -> None:
        batch, tokens = look(ids)
        depths = stored.usable(batch, "none")
        rows = stored.find(batch, depths)
        assert rows is not None and set(depths) == {3}
        stored.origins(batch)
        checked.append((rows[3][0], tokens[0]))

    checked: list[tuple[Tensor, Tensor]] = []
    order = torch.randperm(samples, generator=generator)
    kept = seconds(keep, torch.split(order, BATCH))
    drawn = torch.randint(samples, (FINDS, BATCH), generator=generator)
    found = seconds(find, drawn)
    for tensor, tokens in checked:
        exact.append(torch.equal(tensor, output(tokens[None])[0]))
    store = stored.store
    counts = {
        "entries": len(store),
        "memory_limit": memory,
        "memory_bytes": store.memory_used,
        "file_bytes": store.disk_used,
        "found": FINDS * BATCH,
        "compared": len(exact),
        "exact": sum(exact),
    }
    store.close()
    return {"keep": kept[0], "keep_wall": kept[1], "find": found[0], "find_wall": found[1]} | counts


def measure(samples: int, step: Row) -> Row:
    """All parts at one number of samples; shares are of a step of the model.

    The guide and the cache have seconds on the wall, the others of CPU: each of the same kind.
    """
    ledger, update = ledger_seconds(samples)
    parts = {"ledger": update, "draw": draw_seconds(ledger), "guide": step["guide"]}
    cache = cache_seconds(samples)
    share = {
        "ledger": update / step["step"],
        "draw": parts["draw"] / step["step"],
        "guide": step["guide"] / step["step_wall"],
        "keep": cache["keep_wall"] / step["step_wall"],
        "find": cache["find_wall"] / step["step_wall"],
    }
    outside = share["ledger"] + share["draw"] + share["guide"]
    return {
        "samples": samples,
        "seconds": {**step, **parts},
        "cache": cache,
        "share": {
            **share,
            "without_cache": outside,
            "with_cache": outside + share["find"],
        },
    }


def table(rows: list[Row]) -> str:
    """Markdown, as in docs/budget.md."""
    names = ("ledger", "draw", "guide", "keep", "find", "without_cache", "with_cache")
    lines = [
        "| samples | ledger | drawing epochs | guide | storing | finding | all but the cache "
        "| all, finding |",
        "|" + "---|" * (1 + len(names)),
    ]
    for row in rows:
        cells = " | ".join(f"{row['share'][name]:.2%}" for name in names)
        lines.append(f"| {row['samples']:,} | {cells} |")
    return "\n".join(lines)


def held(rows: list[Row]) -> str:
    """What the cache held, in one line for each number of samples."""
    lines = []
    for row in rows:
        cache = row["cache"]
        lines.append(
            f"- {row['samples']:,} samples: {cache['entries']:,} stored, "
            f"{cache['memory_bytes'] / 2**20:,.0f} MiB in memory (allowed "
            f"{cache['memory_limit'] / 2**20:,.0f}), {cache['file_bytes'] / 2**20:,.0f} MiB in the "
            f"file; {cache['found']:,} of {cache['found']:,} looked up were there, "
            f"{cache['exact']} of {cache['compared']} compared had the same bits."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--show", type=Path, help="print what is in this file, measure nothing")
    given = parser.parse_args()
    if given.show is not None:
        rows = json.loads(given.show.read_text(encoding="utf-8"))["results"]
        print(table(rows), held(rows), sep="\n\n")
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so that seconds of CPU and on the wall are alike
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    step = step_seconds()
    rows = []
    for samples in given.samples:
        rows.append(measure(samples, step))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows), held(rows), sep="\n\n")
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
