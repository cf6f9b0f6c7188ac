"""LoRA through PEFT with a guide: each pair is a component with its own learning rate.

    python examples/lora.py --steps 30

Prints the LoRA pairs with the largest error at the end, and their multipliers.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader

import rgft
from rgft.batches import Collator, tokenize
from rgft.models import load_classifier, load_tokenizer
from rgft.tasks import load_task

BATCH, TOKENS = 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()

    torch.manual_seed(0)
    task = load_task("reviews")
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", task.label_names, tokenizer.pad_token_id)
    pairs = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, pairs)
    examples = tokenize(task, "train", tokenizer, max_length=TOKENS)
    loader = DataLoader(examples, BATCH, shuffle=True, collate_fn=Collator(tokenizer))

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    guide = rgft.Guide(model, optimizer, rgft.Config(granularity="lora"))

    model.train()
    for step, batch in enumerate(islice(loader, given.steps), start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    guide.close()

    table = guide.error_map.to_pandas()
    last = table[(table["step"] == table["step"].max()) & (table["kind"] == "lora")]
    print(f"\nLoRA pairs after step {guide.step}, the ten with the largest error:")
    ranking = last.sort_values("error", ascending=False).head(10)
    print(ranking[["component", "error", "lr_scale"]].to_string(index=False))


if __name__ == "__main__":
    main()
