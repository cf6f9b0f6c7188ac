"""A plain PyTorch loop with a guide: two added lines.

    python examples/plain_loop.py --steps 30 --output error_map.parquet

Fine-tunes a small pre-trained encoder (MiniLM) on film reviews, prints which components of it have
the largest error at the end, and saves the error map over all steps as a table.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import rgft
from rgft.batches import Collator, tokenize
from rgft.models import load_classifier, load_tokenizer
from rgft.tasks import load_task

BATCH, TOKENS = 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("error_map.parquet"))
    given = parser.parse_args()

    torch.manual_seed(0)
    task = load_task("reviews")
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", task.label_names, tokenizer.pad_token_id)
    examples = tokenize(task, "train", tokenizer, max_length=TOKENS)
    loader = DataLoader(examples, BATCH, shuffle=True, collate_fn=Collator(tokenizer))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    guide = rgft.Guide(model, optimizer)  # with `import rgft`, all that is added

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
    last = table[table["step"] == table["step"].max()]
    print(f"\nerror map after step {guide.step}, largest first:")
    ranking = last.sort_values("error", ascending=False)
    print(ranking[["component", "error", "lr_scale"]].to_string(index=False))
    guide.error_map.to_parquet(given.output)
    print(f"\nthe map over all steps: {given.output}")


if __name__ == "__main__":
    main()
