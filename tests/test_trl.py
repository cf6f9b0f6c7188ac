"""TRL, sentence-transformers and PEFT: the callback of the Trainer, unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from loops import sharded_as_on_gpus
from rgft import Config, InputError
from rgft.integrations.transformers import RGFTCallback
from tiny import bert, same_state, values

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
NOUNS = ["the", "a", "cat", "dog", "mat", "log"]
WORDS = ["[PAD]", "[UNK]", "[EOS]", *NOUNS, "sat", "ran", "on", "up", "down", "why"]
STEPS = 8
CONFIG = Config(policy="top", top=0.4, every=2, warmup=2)
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 4,
    "dataloader_pin_memory": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def llama(folder: Path) -> LlamaForCausalLM:
    """From a folder, since DPO loads its reference from where the model came from."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    return LlamaForCausalLM.from_pretrained(folder / "base")


def ready(args: Any) -> Any:
    """Settings of a trainer that is made next."""
    if args.fsdp:
        sharded_as_on_gpus()
    return args


def sft(folder: Path, callback: RGFTCallback, **settings: Any) -> SFTTrainer:
    texts = ["the cat sat on the mat", "a dog ran up", "why the log", "down on a mat"] * 8
    lora = settings.pop("peft_config", None)
    return SFTTrainer(
        model=llama(folder.parent),
        args=ready(SFTConfig(output_dir=str(folder), **{"max_length": 16} | COMMON | settings)),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=[callback],
    )


def dpo(folder: Path, callback: RGFTCallback, **settings: Any) -> DPOTrainer:
    pairs = {
        "prompt": ["the cat", "a dog"] * 16,
        "chosen": ["sat on", "ran up"] * 16,
        "rejected": ["why log", "down the"] * 16,
    }
    lora = settings.pop("peft_config", None)
    return DPOTrainer(
        model=llama(folder.parent),
        args=ready(DPOConfig(output_dir=str(folder), max_length=16, **COMMON | settings)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=[callback],
    )


def sentences(folder: Path, callback: RGFTCallback, **settings: Any) -> Any:
    backbone = folder.parent / "backbone"
    if not backbone.exists():
        model = bert().bert
        model.save_pretrained(backbone)
        words = tokenizer()
        words.save_pretrained(backbone)
    torch.manual_seed(0)
    transformer = Transformer(str(backbone), max_seq_length=12)
    network = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_word_embedding_dimension())], device="cpu"
    )
    pairs = {
        "sentence1": ["the cat sat", "a dog ran"] * 16,
        "sentence2": ["the cat ran", "a log sat"] * 16,
        "score": [0.9, 0.1] * 16,
    }
    lora = settings.pop("peft_config", None)
    if lora is not None:
        network.add_adapter(lora)
    common = COMMON | settings
    return SentenceTransformerTrainer(
        model=network,
        args=ready(SentenceTransformerTrainingArguments(output_dir=str(folder), **common)),
        train_dataset=Dataset.from_dict(pairs),
        loss=CosineSimilarityLoss(network),
        callbacks=[callback],
    )


LORA = {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}
TRAINERS: dict[str, Any] = {
    "sft": (sft, {}),
    "sft-lora": (sft, LORA),
    "sft-packed": (sft, {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
    "dpo": (dpo, {}),
    "sentences": (sentences, {}),
}


def trained(
    name: str, folder: Path, budget: float | None = None, **how: Any
) -> tuple[RGFTCallback, Any]:
    make, settings = TRAINERS[name]
    callback = RGFTCallback(CONFIG, budget=budget)
    trainer = make(folder / "run", callback, **settings)
    trainer.train(**how)
    return callback, trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_it_guides(name: str, tmp_path: Path) -> None:
    callback, _ = trained(name, tmp_path)
    assert callback.guide is not None
    assert callback.guide.step == STEPS
    assert (callback.guide.error_map.values > 0).any()
    assert 0 < sum(callback.guide.plan.trained) < len(callback.guide.plan.trained)


@pytest.mark.parametrize("name", TRAINERS)
def test_it_resumes_exactly(name: str, tmp_path: Path) -> None:
    callback, whole = trained(name, tmp_path)
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    again, resumed = trained(name, tmp_path, resume_from_checkpoint=checkpoint)
    assert same_state(values(whole.model), values(resumed.model))
    assert callback.guide is not None and again.guide is not None
    assert callback.guide.plan.lr_scale == again.guide.plan.lr_scale
    assert torch.equal(callback.guide.error_map.values, again.guide.error_map.values)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_budget_ends_it(name: str, tmp_path: Path) -> None:
    # those of sentences have few steps, and a decision has to fall in them
    share = 0.75 if name == "sentences" else 0.5
    callback, trainer = trained(name, tmp_path, budget=share)
    assert callback.spending is not None
    assert trainer.state.global_step < STEPS
    assert callback.spending.spent == pytest.approx(callback.spending.limit, rel=0.15)


def test_a_packed_run_is_as_long_as_its_packed_rows(tmp_path: Path) -> None:
    """Packing makes fewer rows of the data: schedule and budget are of those."""
    make, settings = TRAINERS["sft-packed"]
    callback = RGFTCallback(CONFIG, budget=0.5)
    epochs = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    trainer = make(tmp_path / "run", callback, **settings, **epochs)
    assert len(trainer.train_dataset) != 32  # as many as there are texts
    trainer.train()
    assert callback.guide is not None and callback.spending is not None
    steps = 2 * -(-len(trainer.train_dataset) // 4)
    assert callback.guide.config.total_steps == trainer.state.max_steps == steps
    assert callback.spending.spent == pytest.approx(callback.spending.limit, rel=0.15)
    assert callback.spending.meter.full == pytest.approx(
        callback.spending.limit * 2 * callback.guide.step / steps, rel=0.05
    )


@pytest.mark.parametrize(
    ("name", "numbered"),
    [("sft", False), ("sft", True), ("dpo", False), ("dpo", True), ("sentences", False)],
)
def test_a_residual_ledger_is_refused(name: str, numbered: bool, tmp_path: Path) -> None:
    """Also where the data has numbers and keeps them: the collators hand on what they know."""
    make, _ = TRAINERS[name]
    callback = RGFTCallback(CONFIG, residuals=tmp_path / "residuals.parquet")
    trainer = make(tmp_path / "run", callback, remove_unused_columns=not numbered)
    if numbered:
        data = trainer.train_dataset
        trainer.train_dataset = data.add_column("sample_ids", list(range(len(data))))
    with pytest.raises(InputError, match="sample_ids"):
        trainer.train()
    if numbered:  # it shows in the first step
        assert callback.guide is not None
        assert callback.guide.step <= 1
    else:  # at the start, and the model is let go of
        assert callback.guide is None
