"""TRL's SFTTrainer with the callback: chat template, loss, methods, merging, generation, FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import rgft
import tiny_chat
from flops import counted_flops
from rgft.integrations.transformers import RGFTCallback
from test_costs import agree, subsets

pytestmark = [
    # peft asks transformers by a name that is going out of use
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
STEPS = 40


def sft(folder: Path, method: str = "full", **changed: Any) -> tuple[SFTTrainer, RGFTCallback]:
    """A trainer of the tiny Llama by a method, and its callback."""
    found = rgft.find_method(method)
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 16,
        "completion_only_loss": True,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    callback = RGFTCallback(found.config)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=tiny_chat.llama(),
        args=SFTConfig(str(folder), **settings | changed),
        train_dataset=Dataset.from_list(tiny_chat.rows()),
        processing_class=tiny_chat.tokenizer(),
        peft_config=lora if found.adapter == "lora" else None,
        callbacks=[callback],
    )
    return trainer, callback


def test_loss_is_on_the_answer_in_the_chat_template(tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path)
    words = tiny_chat.tokenizer()
    text = "<|im_start|> user zero plus one <|im_end|> <|im_start|> assistant is one <|im_end|>"
    row = next(r for r in trainer.train_dataset if words.decode(r["input_ids"]) == text)
    answer = words.convert_tokens_to_ids(["is", "one", "<|im_end|>"])
    assert row["labels"] == [-100] * 8 + answer


def test_loss_is_the_cross_entropy_of_the_answers(tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    logits = tiny_chat.llama()(batch["input_ids"], batch["attention_mask"]).logits
    wanted = [
        cross_entropy(logits[row, place - 1], batch["input_ids"][row, place])
        for row, place in batch["labels"].ne(-100).nonzero().tolist()
    ]
    assert len(wanted) == 3 * 8
    torch.testing.assert_close(loss, torch.stack(wanted).mean())


@pytest.mark.parametrize("method", ["full", "lora", "rgft", "rgft-lora"])
def test_method_trains_what_it_should(method: str, tmp_path: Path) -> None:
    trainer, callback = sft(tmp_path, method)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    lora = {n for n in before if "lora_" in n}
    assert moved == (lora or set(before))
    assert bool(lora) == method.endswith("lora")
    assert callback.guide is not None
    scales = callback.guide.plan.lr_scale
    assert (len(set(scales)) > 1) == method.startswith("rgft")
    if method == "rgft":  # multipliers of mean 1
        assert sum(scales) / len(scales) == pytest.approx(1.0)
    else:
        assert max(scales) == pytest.approx(2.0 if method == "rgft-lora" else 1.0)


@pytest.mark.parametrize("method", ["rgft", "rgft-lora"])
def test_tuned_model_answers_and_its_adapter_merges(method: str, tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path, method, max_steps=100, logging_steps=50)
    trainer.train()
    model, words = trainer.model.eval(), tiny_chat.tokenizer()
    prompt = [{"role": "user", "content": "two plus four"}]
    asked = words.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    asked.pop("token_type_ids", None)
    with torch.no_grad():
        logits, untuned = model(**asked).logits, tiny_chat.llama()(**asked).logits
        answer = model.generate(**asked, max_new_tokens=6, do_sample=False)
        assert not torch.allclose(logits, untuned, atol=0.1)
        if method == "rgft-lora":
            model = model.merge_and_unload()
            assert not [name for name, _ in model.named_parameters() if "lora" in name]
            torch.testing.assert_close(model(**asked).logits, logits, atol=1e-4, rtol=1e-4)
            again = model.generate(**asked, max_new_tokens=6, do_sample=False)
            assert torch.equal(again, answer)
    said = words.decode(answer[0, asked["input_ids"].shape[1] :])
    assert said == "is six <|im_end|>"


def fused_batch(vocabulary: int) -> dict[str, Any]:
    tokens = torch.randint(vocabulary, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(9) < 4, -100)
    return {"input_ids": tokens, "labels": labels, "use_cache": False, "fused_lm_head": True}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [18, 40_000])  # in one tile, in two
def test_step_costs_what_is_counted(vocabulary: int, tied: bool) -> None:
    """The loss has a backward of its own, which computes the logits a second time."""
    model = tiny_chat.llama(vocab_size=vocabulary, tie_word_embeddings=tied)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    agree(model, fused_batch(vocabulary), subsets(model, 3))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_meter_follows_the_trainer(method: str, tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path, method, max_steps=12, pad_to_multiple_of=16)
    meter = rgft.FlopMeter(trainer.model)
    trainer.train()
    meter.close()
    batch = next(iter(trainer.get_train_dataloader()))
    given = {**batch, "use_cache": False, "fused_lm_head": True}
    assert meter.spent == 12 * sum(counted_flops(trainer.model.train(), given))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_function_that_runs_modules_is_seen_from_inside() -> None:
    """Reentrant checkpointing is a custom autograd function, too."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, values: Tensor) -> Tensor:
            hidden = self.first(values)
            return checkpoint(self.second, hidden, use_reentrant=True)

    costs = rgft.CostModel(Checkpointed())
    graph = costs.graph(torch.zeros(3, 4))
    first, second = 2 * 3 * 4 * 6, 2 * 3 * 6 * 2
    assert graph.cost({"first.weight"}).backward == first + second
    assert graph.cost({"second.weight"}).backward == second
    assert graph.cost(()).forward == first + second
