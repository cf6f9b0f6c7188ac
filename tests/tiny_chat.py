"""A tiny random Llama that talks in a chat template, and questions with answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MARKS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
WORDS = (*MARKS, "user", "assistant", "plus", "is", *NUMBERS)
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
Row = dict[str, list[dict[str, str]]]


def rows(count: int = 24) -> list[Row]:
    """Sums below ten, as prompt and completion."""
    pairs = [(a, b) for a in range(10) for b in range(10 - a)]
    return [
        {
            "prompt": [{"role": "user", "content": f"{NUMBERS[a]} plus {NUMBERS[b]}"}],
            "completion": [{"role": "assistant", "content": f"is {NUMBERS[a + b]}"}],
        }
        for a, b in pairs[:count]
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        chat_template=TEMPLATE,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
    )


def llama(**changed: Any) -> LlamaForCausalLM:
    """Two layers, the head tied to the embeddings."""
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": WORDS.index("<|im_end|>"),
        "pad_token_id": 0,
        "initializer_range": 0.3,  # so that frozen embeddings can tell words apart
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings | changed))


def build(folder: Path) -> Path:
    """Both, as `from_pretrained` loads them."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
