"""A tiny random BERT and small data, in folders: what a run needs to take a second or two."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

GOOD = ("fine", "lovely", "superb", "warm", "witty", "bright")
BAD = ("dull", "awful", "tired", "cold", "clumsy", "grim")
FILLER = ("the", "film", "was", "and", "a", "plot", "actor", "scene", "music", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROWS = {"train": 120, "validation": 40, "test": 40}


def build_model(folder: Path, *, layers: int = 2, hidden_size: int = 32) -> Path:
    """A BERT of hidden size 32 with random weights, and a word tokenizer."""
    words = [*SPECIAL, *FILLER, *GOOD, *BAD]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.model_max_length = 64
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classified(rng: random.Random) -> dict[str, Any]:
    """A text whose label is the side that most of its words are on."""
    good = rng.random() < 0.5
    words = rng.choices(GOOD if good else BAD, k=2) + rng.choices(FILLER, k=rng.randint(2, 6))
    rng.shuffle(words)
    return {"text": " ".join(words), "label": "good" if good else "bad"}


def rated(rng: random.Random) -> dict[str, Any]:
    """A text with its share of good words, a float."""
    words = rng.choices(GOOD + BAD, k=4)
    return {"text": " ".join(words), "label": sum(word in GOOD for word in words) / 4}


def paired(rng: random.Random) -> dict[str, Any]:
    """Two texts, and whether they are on the same side."""
    sides = rng.choice((GOOD, BAD)), rng.choice((GOOD, BAD))
    first, second = (" ".join(rng.choices(side, k=3)) for side in sides)
    return {"sentence1": first, "sentence2": second, "label": int(sides[0] is sides[1])}


def build_data(
    folder: Path,
    row: Callable[[random.Random], dict[str, Any]] = classified,
    rows: dict[str, int] | None = None,
) -> Path:
    """train, validation and test as JSON Lines."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (rows or ROWS).items():
        lines = [json.dumps(row(rng)) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
