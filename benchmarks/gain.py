"""Where fine-tuning gains, and whether the error map tells: components are put back in turn.

MiniLM is fully fine-tuned for three epochs, at the rate that the suite `headline` chose for the
task (with all rows of TREC and CoLA, which have fewer here). Then each component in turn has its
pre-trained weights put back, the rest staying as tuned. What that costs is what was gained there
(Zhang, Bengio and Singer 2022):

    gain_k = metric as tuned - metric with component k put back, on the validation split

Components stand in for one another, so that it is also measured with k and all below put back.
The pooler and the head are left out: they have no pre-trained weights. Beside it stand E_k after a
tenth of the run and at its end, and how far the component has moved, relative to its norm.

    RGFT_DATA=DIR python benchmarks/gain.py --records benchmarks/records/gain.jsonl

A second call runs only the cells that are missing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from invocation import invocation
from torch import Tensor, nn

from rgft import metrics, partition, records
from rgft.bench.journal import append_record, read_records
from rgft.bench.record import error_map
from rgft.inputs import load_inputs
from rgft.models import load_classifier
from rgft.progress import Quiet
from rgft.run_samples import load_data
from rgft.sample_losses import sample_losses
from rgft.spec import RunSpec
from rgft.train import run

SEEDS = (0, 1, 2)
TASKS = {  # training rows, and the rate
    "trec": (2000, 1e-4),
    "sst2": (2000, 5e-5),
    "reviews": (2000, 2e-4),
    "cola": (4000, 5e-5),
}
LARGE = ("cola",)  # validation splits that have more rows
PRE_TRAINED = ("embedding", "layer")  # pooler and head begin anew
EVALUATED = 1000  # rows of the validation split at most
BATCH = 64


def measure(task: str, seed: int) -> dict[str, Any]:
    """One run, and every component of it put back."""
    rows, lr = TASKS[task]
    spec = RunSpec(
        task=task,
        method="full",
        epochs=3,
        lr=lr,
        seed=seed,
        max_train_rows=rows,
        max_evaluation_rows=EVALUATED if task in LARGE else None,
        evaluations=1,
        precision="bfloat16",
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        record = run(spec, folder)
        if record["status"] != "finished":
            raise SystemExit(1)
        told = error_map(folder / "error_map.parquet")
        with Quiet():
            data = load_data(spec)
            inputs = load_inputs(spec, data)
            before = load_classifier(spec.model, data.label_names, 0)
            tuned = load_classifier(str(folder), data.label_names, 0)
    assert told is not None
    batches = batches_of(inputs, data)
    base = judged(tuned, batches)
    first = {name: parameter.detach() for name, parameter in before.named_parameters()}
    last = dict(tuned.named_parameters())
    parts = [part for part in partition(tuned, "layer") if part.kind in PRE_TRAINED]
    components = []
    for i, part in enumerate(parts):
        alone = [one.parameter for one in part.slices]
        below = [one.parameter for other in parts[: i + 1] for one in other.slices]
        column = told["components"].index(part.name)
        components.append(
            {
                "name": part.name,
                "depth": part.depth,
                "early": told["error"][0][column],
                "end": told["error"][-1][column],
                "moved": distance(last, first, alone),
                "alone": lost(tuned, first, alone, batches, base),
                "below": lost(tuned, first, below, batches, base),
            }
        )
    return {
        "task": task,
        "seed": seed,
        "rows": rows,
        "lr": lr,
        "early_at": told["course"][0],
        "metrics": record["metrics"],
        "metric": data.metric,
        "components": components,
    }


def lost(
    model: nn.Module,
    before: dict[str, Tensor],
    names: list[str],
    batches: list[dict[str, Tensor]],
    base: dict[str, float],
) -> dict[str, float]:
    """What it costs in each metric, and adds to the loss, to put some parameters back."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in names}
    put(parameters, {name: before[name] for name in names})
    without = judged(model, batches)
    put(parameters, kept)
    found = {name: base[name] - without[name] for name in base}
    return {**found, "loss": -found["loss"]}


def distance(now: dict[str, nn.Parameter], before: dict[str, Tensor], names: list[str]) -> float:
    """How far parameters have moved, relative to their norm."""
    moved = sum(float((now[name].detach() - before[name]).square().sum()) for name in names)
    return float((moved / sum(float(before[name].square().sum()) for name in names)) ** 0.5)


def batches_of(inputs: Any, data: Any) -> list[dict[str, Tensor]]:
    """Batches of the validation split."""
    rows = inputs.examples(data, "validation")
    return [inputs.collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


@torch.no_grad()
def judged(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics and mean loss of the validation split, in single precision."""
    model.eval()
    logits = torch.cat([model(**batch).logits for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    loss = float(sample_losses(logits, labels, "classification").mean())
    return {**metrics.compute("classification", logits, labels), "loss": loss}


@torch.no_grad()
def put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Overwrite some of them."""
    for name, value in values.items():
        parameters[name].copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="JSON Lines, added to")
    given = parser.parse_args()
    done = {(record["task"], record["seed"]) for record in read_records(given.records)}
    for task in TASKS:
        for seed in SEEDS:
            if (task, seed) in done:
                continue
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            record = measure(task, seed)
            record |= {"started": started, "command": invocation(__file__, "--records")}
            records.note_environment(record, 0)
            append_record(given.records, records.finite(record))
            told = ", ".join(f"{part['alone']['loss']:.3f}" for part in record["components"])
            print(f"{task} seed {seed}: {told}", flush=True)


if __name__ == "__main__":
    main()
