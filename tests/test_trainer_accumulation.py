"""What docs/integrations/trainer.md says of accumulation: the Trainer's own, without the guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainingArguments,
)

from loops import InOrder
from tiny import bert, tokens, values

ROWS, PARTS = 12, 3


def llama(kind: Any = LlamaForSequenceClassification) -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 60}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 3}
    return _seeded(lambda: kind(LlamaConfig(**shape | heads | PADDED)))


def language_model() -> Any:
    return llama(LlamaForCausalLM)


def gpt2() -> Any:
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "num_labels": 3}
    off = {f"{where}_pdrop": 0.0 for where in ("attn", "embd", "resid")}
    return _seeded(lambda: GPT2ForSequenceClassification(GPT2Config(**shape | off | PADDED)))


PADDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def change(folder: Path, model: Any, parts: int, **attributes: Any) -> dict[str, Tensor]:
    """What one step of SGD does to the weights, with the batch in so many parts."""
    for name, value in attributes.items():
        setattr(model, name, value)
    (samples,) = tokens(1, ROWS)
    if type(model).__name__.endswith("CausalLM"):
        samples["labels"] = samples["input_ids"]
    rows = [{key: value[i] for key, value in samples.items()} for i in range(ROWS)]
    before = values(model)
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=ROWS // parts,
        gradient_accumulation_steps=parts,
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    InOrder(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, constant)
    ).train()
    return {name: value - before[name] for name, value in values(model).items()}


@pytest.mark.parametrize(
    ("make", "attributes", "times"),
    [
        (bert, {}, PARTS),  # its loss ignores num_items_in_batch, which it accepts
        (bert, {"accepts_loss_kwargs": False}, 1),
        (gpt2, {}, PARTS),
        (llama, {}, PARTS),
        (language_model, {}, 1),  # its loss divides by num_items_in_batch
    ],
    ids=["bert", "bert-told", "gpt2", "llama", "language-model"],
)
def test_some_models_sum_what_is_accumulated(
    make: Any, attributes: dict[str, Any], times: int, tmp_path: Path
) -> None:
    whole = change(tmp_path, make(), 1)
    parts = change(tmp_path, make(), PARTS, **attributes)
    assert any(value.abs().max() > 1e-4 for value in whole.values())
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], times * value, rtol=1e-3, atol=1e-6)
