"""Memory of full fine-tuning, LoRA and budgets: peak of a fresh process, and saved activations.

300 rows of TREC, MiniLM, one epoch as the reference. The peak is that of `rgft train` in a process
of its own. The activations are what one step saves for backward, on a batch of 32 x 64 tokens for
all, with what that run trained: bytes of all distinct storages but those of parameters; and again
by how many layers stay frozen, since 300 rows are few for a survey to find any.

    python benchmarks/memory.py --record benchmarks/records/memory.json
    python benchmarks/memory.py --show benchmarks/records/memory.json  # as in docs/budget.md
"""

# Nothing heavy is imported here: a process inherits the peak of the one that starts it.
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from invocation import invocation

ARMS = (
    ("full", None),
    ("lora", None),
    ("rgft", "0.1"),
    ("rgft", "0.2"),
    ("rgft", "0.3"),
    ("rgft", "0.5"),
)
ROWS = {"train": 300, "validation": 100}
BATCH, TOKENS = 32, 64
LAYERS = 6
Row = dict[str, Any]


def write_data(folder: Path) -> None:
    """The first rows of each split, as JSON Lines."""
    from rgft.tasks import load_task  # noqa: PLC0415

    task = load_task("trec")
    for split, count in ROWS.items():
        table = task.splits[split].select(range(count))
        texts, labels = table[task.input_columns[0]][:], table[task.label_column][:]
        rows = [
            {"text": text, "label": task.label_names[label]}
            for text, label in zip(texts, labels, strict=True)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def saved_activations(method: str, frozen_below: int, layers: int = LAYERS) -> int:
    """Bytes that one step of a method saves for backward, in a model with so many layers."""
    import torch  # noqa: PLC0415
    from torch import Tensor  # noqa: PLC0415

    import rgft  # noqa: PLC0415
    from rgft.adapters import ADAPTERS  # noqa: PLC0415
    from rgft.models import load_classifier, load_tokenizer  # noqa: PLC0415
    from rgft.structure.cutting import keep_layers  # noqa: PLC0415

    torch.manual_seed(0)
    tokenizer = load_tokenizer("minilm")
    found = rgft.find_method(method)
    names = tuple("012345")
    model = load_classifier("minilm", names, tokenizer.pad_token_id).train()
    keep_layers(model, layers)
    if found.adapter is not None:
        model = ADAPTERS[found.adapter].add(model, 8)
    for parameter in model.parameters():
        parameter.grad = None
    trained = [p for p in model.parameters() if p.requires_grad]
    config = rgft.Config(policy="uniform", frozen_below=frozen_below)
    guide = rgft.Guide(model, torch.optim.SGD(trained, lr=0.0), config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    tokens = torch.randint(1000, 20000, (BATCH, TOKENS))
    labels = torch.zeros(BATCH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=tokens, labels=labels).loss.backward()
    guide.close()
    return sum(kept.values())


def apart(function: Any, *given: Any) -> Any:
    """The result of a function that ran in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def run(data: Path, method: str, budget: str | None) -> Row:
    """One arm."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rgft.cli", "train", "--data", str(data)]
        command += ["--method", method, "--epochs", "1", "--evaluations", "1"]
        command += ["--output-dir", folder]
        command += [] if budget is None else ["--budget", budget]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{method}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    frozen_below, layers = int(result["config"]["frozen_below"]), int(result["layers"]["kept"])
    return {
        "method": method,
        "budget": budget,
        "frozen_below": frozen_below,
        "layers": layers,
        "batch_size": result["batch_size"],
        "flops_share": result["flops"]["share"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "saved_bytes": apart(saved_activations, method, frozen_below, layers),
    }


def table(rows: list[Row]) -> str:
    """Markdown, as in docs/budget.md."""
    lines = [
        "| run | layers | always frozen | batch | peak of the process | saved for backward |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["method"] + ("" if row["budget"] is None else f", budget {row['budget']}")
        frozen = f"0 to {row['frozen_below'] - 1}" if row["frozen_below"] else "none"
        peak, saved = (f"{row[k] / 2**20:.0f} MiB" for k in ("peak_memory_bytes", "saved_bytes"))
        lines.append(
            f"| `{name}` | {row['layers']} | {frozen} | {row['batch_size']} | {peak} | {saved} |"
        )
    return "\n".join(lines)


def by_layers(rows: list[Row]) -> str:
    """Markdown, as in docs/budget.md."""
    head = " | ".join(str(row["frozen"]) for row in rows)
    cells = " | ".join(f"{row['saved_bytes'] / 2**20:.0f} MiB" for row in rows)
    rule = "|" + "---|" * (1 + len(rows))
    return f"| frozen layers | {head} |\n{rule}\n| saved for backward | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--show", type=Path, help="print what is in this file, measure nothing")
    given = parser.parse_args()
    if given.show is not None:
        record = json.loads(given.show.read_text(encoding="utf-8"))
        print(table(record["results"]), by_layers(record["by_frozen_layers"]), sep="\n\n")
        return
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows, layers = [], []
    with tempfile.TemporaryDirectory() as folder:
        apart(write_data, Path(folder))
        for method, budget in ARMS:
            rows.append(run(Path(folder), method, budget))
            print(rows[-1], flush=True)
    for below in range(1, LAYERS + 2):
        layers.append({"frozen": below - 1, "saved_bytes": apart(saved_activations, "full", below)})
        print(layers[-1], flush=True)
    print(table(rows), by_layers(layers), sep="\n\n")
    if given.record is not None:
        from rgft import records  # noqa: PLC0415
        from rgft.atomic import write_text_atomically  # noqa: PLC0415

        record = {
            "started": started,
            "command": invocation(__file__, "--record"),
            "results": rows,
            "by_frozen_layers": layers,
        }
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
