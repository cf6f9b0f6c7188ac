"""Tiny models and batches that several test modules train."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

Batch = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three linear maps: the components "0", "2" and "4", of which the last is a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)]
        return nn.Sequential(*layers).to(dtype)


def mlp_batches(count: int, dtype: torch.dtype = torch.float64) -> Batches:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 5, generator=random).to(dtype),
            torch.randn(8, 3, generator=random).to(dtype),
        )
        for _ in range(count)
    ]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def bert(layers: int = 3, dtype: torch.dtype = torch.float32, **changed: Any) -> nn.Module:
    """A BERT classifier without dropout, but for what of its configuration is `changed`."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 60,
        "max_position_embeddings": 16,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = BertConfig(**settings | changed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = BertForSequenceClassification(config).to(dtype)
    return model.train()


def bert_with(adapter: str, size: int = 4, layers: int = 3) -> nn.Module:
    """The same with what a method adds to it."""
    from rgft.adapters import ADAPTERS  # noqa: PLC0415 - slow to import

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # peft asks transformers by a name that goes out of use
        torch.manual_seed(0)
        return ADAPTERS[adapter].add(bert(layers), size).train()


def bert_with_lora(layers: int = 3) -> nn.Module:
    return bert_with("lora", layers=layers)


def tokens(count: int = 1, rows: int = 4) -> list[Batch]:
    random = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(1, 60, (rows, 7), generator=random),
            "attention_mask": torch.ones(rows, 7, dtype=torch.long),
            "labels": torch.randint(0, 3, (rows,), generator=random),
        }
        for _ in range(count)
    ]


def checkpoint_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """As transformers does it, under the name that it has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # before 5.23
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def bert_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[object],
    loss_of: Callable[..., Tensor],
) -> Iterator[float]:
    """One optimizer step a batch; yields the loss after each."""
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        yield loss.item()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """State by parameter name, copied."""
    return {
        name: copy.deepcopy(dict(optimizer.state[p])) if p in optimizer.state else {}
        for name, p in model.named_parameters()
    }


def hooks(model: nn.Module) -> int:
    """How many are called at a forward pass, and how many calls are gone around."""
    parts = list(model.modules())
    counts = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in parts]
    return sum(counts) + sum(m._compiled_call_impl is not None for m in parts)


def same_state(left: object, right: object) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(same_state(left[k], right[k]) for k in left)
        )
    if isinstance(left, (list, tuple)):
        return (
            isinstance(right, (list, tuple))
            and len(left) == len(right)
            and all(map(same_state, left, right))
        )
    return left == right
