"""Suites for models and data that are not here: each runs on tiny ones of the same kind.

A model of the same architecture with random weights takes the place of each, a few random rows in
the schema of the hub that of each task. Every task, model and arm runs at least once, at budgets in
turn, with the options of the suite but for its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Tokenizer,
)

import hub_rows
import tiny_images
import tiny_run
import tiny_texts
from rgft.bench.cells import Cell, Point, cell, check_arms_differ
from rgft.bench.execute import execute
from rgft.bench.suite import Suite, load_suite
from rgft.methods import find_method
from rgft.tasks import TASKS

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
RECIPES = ("glue", "superglue", "cifar100", "vision", "xsum", "metamathqa", "llm")
ROWS = {"train": 48, "validation": 16}
BESIDE = {"metamathqa": ("gsm8k", "wikitext")}  # its validation and test, and what is forgotten
MANY_WINDOWS = {"train": 16, "validation": 96}  # of general text
DECIDE_LATE = ("rgft-lora", "inverse", "auto-rgn")  # later than these short runs end
MANY_CLASSES = {"train": 120, "validation": 16}  # each of CIFAR-100's has to occur


def roberta(folder: Path) -> Path:
    """With a byte-level tokenizer, as the real one has."""
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [*tiny_run.FILLER, *tiny_run.GOOD, *tiny_run.BAD]
    trained.train_from_iterator([" ".join(words)] * 4, vocab_size=400, special_tokens=special)
    folder.mkdir()
    trained.save_model(str(folder))
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = RobertaTokenizer(*files, model_max_length=64)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
    )
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _built(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """With a tokenizer of whole words, in the format of SentencePiece's unigrams."""
    words = [f"▁{word}" for word in (*tiny_run.FILLER, *tiny_run.GOOD, *tiny_run.BAD, "summarize")]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    tokenizer = T5Tokenizer(vocab=[*marks, *((word, -2.0) for word in words)], extra_ids=0)
    return _built(folder, tiny_texts.t5(dropout_rate=0.1), tokenizer)


def bart(folder: Path) -> Path:
    """With RoBERTa's tokenizer, as the real one has."""
    tokenizer = RobertaTokenizer.from_pretrained(roberta(folder))
    model = tiny_texts.bart(vocab_size=len(tokenizer), max_position_embeddings=512)
    return _built(folder, model, tokenizer)


LETTERS = [chr(c) for c in range(33, 127)]


def llama(folder: Path) -> Path:
    """With a token a letter."""
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *LETTERS])}
    model = tiny_texts.llama(vocab_size=len(vocab), max_position_embeddings=768, pad_token_id=None)
    return _built(folder, model, LlamaTokenizer(vocab=vocab, merges=[]))


def gemma(folder: Path) -> Path:
    """With a token a letter."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n"]
    vocab = {w: i for i, w in enumerate([*marks, *LETTERS])}
    model = tiny_texts.gemma(vocab_size=len(vocab), max_position_embeddings=768)
    return _built(folder, model, GemmaTokenizer(vocab=vocab, merges=[]))


BUILDERS: Mapping[str, Callable[[Path], Path]] = {
    "google-bert/bert": tiny_run.build_model,
    "FacebookAI/roberta": roberta,
    "google/vit": tiny_images.build_model,
    "google-t5/t5": t5,
    "facebook/bart": bart,
    "meta-llama/Llama-2": llama,
    "google/gemma": gemma,
    "smollm2": llama,
    "efficientnet-lite0": lambda folder: tiny_images.build_model(folder, "efficientnet-lite"),
}


def models(suite: Suite, folder: Path) -> dict[str, Path]:
    """A tiny model for each of the suite's, by its name."""
    built: dict[str, Path] = {}
    found = {}
    for model in suite.models:
        (kind,) = (kind for kind in BUILDERS if model.name.startswith(kind))
        if kind not in built:
            built[kind] = BUILDERS[kind](folder / kind.replace("/", "-"))
        found[model.name] = built[kind]
    return found


def shortened(one: Cell, model: Path) -> Cell:
    size = None if one.spec.image_size is None else tiny_images.SIDE
    usual = find_method(one.spec.method).config
    guided = usual.warmup or one.spec.method in DECIDE_LATE
    often = {"every": min(2, usual.every), "warmup": min(2, usual.warmup)} if guided else {}
    spec = replace(
        one.spec,
        model=str(model),
        epochs=1.0,
        batch_size=8,
        image_size=size,
        settings={**one.spec.settings, **often},
        max_train_rows=None,
        max_evaluation_rows=None,
        max_target_length=one.spec.max_target_length and min(96, one.spec.max_target_length),
        written_rows=one.spec.written_rows and 1,
    )
    return replace(one, spec=spec)


def test_every_suite_with_other_models_is_a_recipe_that_is_run() -> None:
    """MiniLM is here, and tiny.yaml has a model of its own."""
    suites = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in SUITES.glob("*.yaml")}
    others = {n for n, suite in suites.items() if suite["models"] not in (["minilm"], ["model"])}
    assert others == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_end_to_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(SUITES / f"{name}.yaml")
    check_arms_differ(suite)
    small = models(suite, tmp_path)
    monkeypatch.setenv("RGFT_DATA", str(tmp_path / "data"))
    for task in suite.tasks:
        for needed in (task.name, *BESIDE.get(task.name, ())):
            rows = {"cifar100": MANY_CLASSES, "wikitext": MANY_WINDOWS}.get(needed, ROWS)
            hub_rows.write(needed, tmp_path / "data" / needed, rows)
    count = max(len(suite.models), len(suite.tasks), len(suite.arms))
    points = zip(cycle(suite.models), cycle(suite.tasks), cycle(suite.arms), strict=False)
    for i, (model, task, arm) in enumerate(islice(points, count)):
        budget = arm.budgets[i % len(arm.budgets)]
        point = Point(model, task, arm, budget)
        one = shortened(cell(suite, point, arm.rates[0], suite.seeds[0]), small[model.name])
        record = execute(one, tmp_path / "runs" / str(i), threads=1)
        assert record is not None and record["status"] == "finished", record
        assert record["metric"] == TASKS[task.name].metric
        assert record["metrics"]["validation"].keys() >= {record["metric"]}
        assert (record["forgetting"] is not None) == bool(one.spec.forgetting)
        if isinstance(budget, float) and budget < 1:
            assert record["flops"]["share"] < budget + 0.25
