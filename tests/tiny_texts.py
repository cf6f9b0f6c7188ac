"""Tiny random models that write texts, and texts to write that they can learn, in folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tiny_run import BAD, FILLER, GOOD

MARKS = ("<pad>", "</s>", "<unk>")
WORDS = (*MARKS, ":", "it", "summarize", *FILLER, *GOOD, *BAD)
ROWS = {"train": 96, "validation": 24, "test": 24}
_SMALL = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
_DECODER = {
    **_SMALL,
    **_IDS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that frozen embeddings can tell words apart
}


def t5(**changed: Any) -> PreTrainedModel:
    """Without dropout, whose masks no two ways to train could share."""
    settings = {
        "vocab_size": len(WORDS),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return T5ForConditionalGeneration(T5Config(**settings | changed))


def bart(**changed: Any) -> PreTrainedModel:
    sides = {
        f"{side}_{name}": count
        for side in ("encoder", "decoder")
        for name, count in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
    settings = {
        "vocab_size": len(WORDS),
        "d_model": 32,
        "max_position_embeddings": 64,
        "init_std": 0.3,
        "forced_eos_token_id": None,
    }
    return BartForConditionalGeneration(BartConfig(**settings | sides | ids | changed))


def llama(**changed: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_DECODER | changed))


def gemma(**changed: Any) -> PreTrainedModel:
    """Its head is tied to the embeddings."""
    return GemmaForCausalLM(GemmaConfig(**_DECODER | changed))


def gpt2() -> PreTrainedModel:
    """Absolute positions, and matrices that lie the other way round."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), initializer_range=0.3, **shape, **_IDS)
    )


MODELS = {"t5": t5, "bart": bart, "llama": llama, "gemma": gemma, "gpt2": gpt2}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a word; those of encoders end every text."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind in ("t5", "bart"):
        from tokenizers.processors import TemplateProcessing  # noqa: PLC0415

        words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )


def build_model(folder: Path, kind: str = "t5") -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODELS[kind]().save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def row(rng: random.Random) -> dict[str, Any]:
    """A text, and the word in it that says how something was, and whether there was music."""
    word = rng.choice((*GOOD, *BAD))
    words = [word, *rng.choices(FILLER, k=rng.randint(2, 6))]
    rng.shuffle(words)
    music = " and music" * ("music" in words)
    return {"text": " ".join(words), "summary": f"it was {word}{music}"}


def build_data(folder: Path, rows: dict[str, int] | None = None) -> Path:
    """train, validation and test as JSON Lines."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (rows or ROWS).items():
        lines = [json.dumps(row(rng)) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
