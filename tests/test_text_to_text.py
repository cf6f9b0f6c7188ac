"""Texts to write: whole runs of models that write them, against transformers alone."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

import rgft
import tiny_texts
from flops import counted_flops
from rgft.budgeting import batch_shapes, full_fine_tuning_flops
from rgft.costs import CostModel
from rgft.errors import InputError
from rgft.inputs import load_inputs
from rgft.methods import find_method
from rgft.spec import RunSpec, command
from rgft.tasks import load_pairs
from rgft.text_to_text import INPUTS, TextToTextInputs, Writing
from rgft.train import run
from rgft.writing import write
from runs import assert_a_kill_leaves_no_trace, call, record_of

ENCODERS = ("t5", "bart")
WRITING = Writing(prompt=24, answer=8, beams=1, rows=128)
PROMPT = "summarize : {text} \n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data, and a model of each kind."""
    root = tmp_path_factory.mktemp("texts")
    models = {kind: tiny_texts.build_model(root / kind, kind) for kind in tiny_texts.MODELS}
    return {"data": tiny_texts.build_data(root / "data"), **models}


@pytest.fixture
def spec(folders: dict[str, Path]) -> RunSpec:
    return RunSpec(
        model=str(folders["t5"]),
        data=str(folders["data"]),
        target_column="summary",
        prompt=PROMPT,
        method="full",
        epochs=2,
        batch_size=8,
        lr=3e-3,
        evaluations=1,
        max_length=WRITING.prompt,
        max_target_length=WRITING.answer,
    )


def of(spec: RunSpec, folders: dict[str, Path], kind: str, **changed: Any) -> RunSpec:
    return replace(spec, model=str(folders[kind]), **changed)


def inputs_of(folder: Path, prompt: str = PROMPT, writing: Writing = WRITING) -> TextToTextInputs:
    kind = "encoder-decoder" if folder.name in ENCODERS else "decoder"
    return INPUTS[kind](str(folder), prompt, writing)


def rows_of(folder: Path, split: str) -> list[dict[str, str]]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# what a run leaves


def greedily(model: Any, tokenizer: Any, prompt: str) -> str:
    """Token by token, without transformers' search, padding or cache."""
    encoder = model.config.is_encoder_decoder
    read = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = torch.tensor([[model.config.decoder_start_token_id]]) if encoder else read
    start = written.shape[1]
    for _ in range(WRITING.answer):
        given = (
            {"input_ids": read, "decoder_input_ids": written} if encoder else {"input_ids": written}
        )
        token = model(**given).logits[:, -1].argmax(-1)
        if token.item() == tokenizer.eos_token_id:
            break
        written = torch.cat([written, token[None]], dim=1)
    return str(tokenizer.decode(written[0, start:], skip_special_tokens=True)).strip()


def loss_of(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """Summed over the tokens of an answer and its end, and how many those are."""
    end = tokenizer.eos_token_id
    learned = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
    read = tokenizer(prompt)["input_ids"]
    if model.config.is_encoder_decoder:
        before = [model.config.decoder_start_token_id, *learned[:-1]]
        given = {"input_ids": torch.tensor([read]), "decoder_input_ids": torch.tensor([before])}
        logits = model(**given).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*read, *learned]])).logits[0, len(read) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(learned), reduction="sum")
    return float(loss), len(learned)


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_a_run_leaves_a_model_that_writes_what_it_says(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    record = run(of(spec, folders, kind, epochs=4), tmp_path)
    losses_over_steps = [look["loss"] for look in record["train_loss"]]
    assert losses_over_steps[-1] < losses_over_steps[0] / 1.5
    factory = AutoModelForSeq2SeqLM if kind in ENCODERS else AutoModelForCausalLM
    model = factory.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    losses, scores, scorer = [], [], RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    said = [row for row in rows_of(tmp_path, "written") if row["split"] == "test"]
    written = []
    with torch.no_grad():
        for row in rows_of(folders["data"], "test"):
            prompt = PROMPT.format(text=row["text"])
            text = greedily(model, tokenizer, prompt)
            written.append((text, [row["summary"]]))
            losses.append(loss_of(model, tokenizer, prompt, row["summary"]))
            scores.append(scorer.score(row["summary"], text))
    assert [row["row"] for row in said] != list(range(len(said)))  # from short to long
    for row in said:
        assert (row["written"], row["references"]) == written[row["row"]]
        read = rows_of(folders["data"], "test")[row["row"]]["text"]
        assert row["prompt"] == PROMPT.format(text=read)
    found = record["metrics"]["test"]
    loss = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    for name in ("rouge1", "rougeL"):
        mean = sum(score[name].fmeasure for score in scores) / len(scores)
        assert found[name] == pytest.approx(mean)
    assert record["metric"] == "rougeL"
    assert record["history"][-1]["validation"] == record["metrics"]["validation"]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_no_setting_beside_the_weights_has_a_part_in_writing(
    folders: dict[str, Path], kind: str
) -> None:
    inputs = inputs_of(folders[kind])
    model: Any = inputs.load_model(())
    plain, tokenizer = GenerationConfig(pad_token_id=0, eos_token_id=1), inputs.processor
    model.generation_config.update(
        do_sample=True,
        temperature=0.3,
        min_length=20,
        no_repeat_ngram_size=1,
        num_beams=2,
        num_return_sequences=2,
        suppress_tokens=list(range(2, 12)),
        bad_words_ids=[[12]],
        exponential_decay_length_penalty=(1, 9.0),
        guidance_scale=2.0,
    )
    own = model.generation_config.to_dict()
    rows = inputs.examples(load_pairs(folders["data"], "summary"), "test")[::3]
    prompts = [
        tokenizer.decode(inputs.questions([row])["input_ids"][0][: -1 if kind == "t5" else None])
        for row in rows
    ]
    with torch.no_grad():
        alone = [greedily(model.eval(), tokenizer, prompt) for prompt in prompts]
    assert write(model, inputs, rows) == alone
    assert model.generation_config.to_dict() == own
    model.generation_config = plain
    if kind == "t5":
        plain.decoder_start_token_id = 0
    beams = []
    for row in rows:
        questions = inputs.questions([row])
        tokens = model.generate(
            **questions, num_beams=3, max_new_tokens=WRITING.answer, do_sample=False
        )
        beams.append(inputs.written(tokens, questions)[0])
    inputs.writing = replace(WRITING, beams=3)
    assert write(model, inputs, rows) == beams
    assert beams != alone


def test_tokens_that_a_model_forces_are_written(folders: dict[str, Path]) -> None:
    inputs = inputs_of(folders["bart"])
    model: Any = inputs.load_model(())
    rows = inputs.examples(load_pairs(folders["data"], "summary"), "test")[::3]
    first, last = tiny_texts.FILLER[0], tiny_texts.FILLER[1]
    ids = inputs.processor.convert_tokens_to_ids([first, last])
    model.generation_config.update(forced_bos_token_id=ids[0], forced_eos_token_id=ids[1])
    texts = [text.split() for text in write(model, inputs, rows)]
    assert {text[0] for text in texts} == {first}
    assert {text[-1] for text in texts if len(text) == WRITING.answer} == {last}


# methods


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("method", ["rgft", "lora", "rgft-lora", "rgft-threshold"])
def test_every_kind_of_method_trains_and_meets_its_budget(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, method: str, kind: str
) -> None:
    settings = {"every": 2, "warmup": 2} if method == "rgft-threshold" else {}
    given = of(spec, folders, kind, method=method, settings=settings, epochs=6, written_rows=4)
    before = load_file(folders[kind] / "model.safetensors")
    record = run(replace(given, budget="0.4"), tmp_path)
    assert abs(record["flops"]["share"] - 0.4) < 0.02
    assert set(record["chance"]) == set(record["metrics"])
    assert all(chance == {"value": None, "rows": 4} for chance in record["chance"].values())
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_without_a_survey_all_layers_train(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    given = of(spec, folders, kind, method="rgft", budget="0.5", lr=None, batch_size=None)
    record = run(given, tmp_path)
    assert record["survey"] is None and record["prefix_cache"] is None
    assert record["config"]["frozen_below"] == 1
    surveyed = find_method("rgft").surveyed
    assert surveyed is not None
    names = ("lr", "batch_size", "adam_beta2", "dropout")
    assert tuple(record[name] for name in names) == dataclasses.astuple(surveyed.deep)
    before, after = (load_file(f / "model.safetensors") for f in (folders[kind], tmp_path))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and all("embed" in name or name.startswith("shared") for name in same)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_killed_run_resumes_to_the_same_bits(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    given = of(spec, folders, kind, method="rgft", budget="0.9", skip=0.5, epochs=3)
    given = replace(given, evaluations=2, written_rows=4, prompt=None)  # whose spaces would be cut
    assert_a_kill_leaves_no_trace(command(given).split()[1:], tmp_path)


def test_a_run_finds_its_own_budget(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    record = run(of(spec, folders, "t5", method="rgft", budget="auto", epochs=1), tmp_path)
    assert record["budget_auto"]["stages"][-1]["validation"] == pytest.approx(
        record["history"][-1]["validation"]["rougeL"]
    )


def test_pairs_are_left_beside_the_merged_model(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel  # noqa: PLC0415 - slow to import

    run(of(spec, folders, "llama", method="lora", lr=1e-2), tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a renamed attribute
        apart = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 3, 7, 9, 12]])
    with torch.no_grad():
        ours, theirs = merged(input_ids=ids).logits, apart(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_cached_prefix_changes_no_weight(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = of(spec, folders, "llama", settings={"frozen_below": 2}, written_rows=4)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    run(given, plain)
    record = run(replace(given, prefix_cache="float32"), cached)
    assert record["prefix_cache"]["hits"] == 96
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (plain, cached))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_full_fine_tuning_costs_what_it_was_priced_at(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    given = of(spec, folders, kind, prompt="{text}", epochs=2, written_rows=4)
    whole = run(given, tmp_path)["flops"]["full"]
    inputs = inputs_of(folders[kind], "{text}")
    rows = inputs.examples(load_pairs(folders["data"], "summary"), "train")
    lengths = [inputs.lengths(row) for row in rows]
    shapes = batch_shapes(lengths, inputs.multiple, batch_size=8, epochs=2, seed=3)
    costs = CostModel(inputs.load_model(()))
    priced = full_fine_tuning_flops(costs, shapes, inputs.longest(rows), inputs)
    assert priced == pytest.approx(whole, rel=0.03)
    assert record_of(tmp_path)["flops"]["spent"] == whole


# batches


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_batches_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    inputs = inputs_of(folders[kind])
    rows = inputs.examples(load_pairs(folders["data"], "summary"), "train")[:5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.DataCollatorForSeq2Seq(inputs.processor, pad_to_multiple_of=8)(
            [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        )
    ours = inputs.collate(rows)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.equal(values, torch.as_tensor(theirs[name])), name


def test_a_decoder_learns_the_answer_alone(folders: dict[str, Path]) -> None:
    inputs = inputs_of(folders["llama"])
    tokenizer, model = inputs.processor, inputs.load_model(()).eval()
    rows = rows_of(folders["data"], "train")[:5]
    batch = inputs.collate(inputs.examples(load_pairs(folders["data"], "summary"), "train")[:5])
    with torch.no_grad():
        found = model(**batch).loss.item()
        losses = [
            loss_of(model, tokenizer, PROMPT.format(text=r["text"]), r["summary"]) for r in rows
        ]
    assert found == pytest.approx(
        sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses), rel=1e-5
    )


def test_a_long_prompt_keeps_its_cue_and_a_long_answer_loses_its_end(
    folders: dict[str, Path],
) -> None:
    task = load_pairs(folders["data"], "summary")
    prompt = "summarize : {text} it was"
    inputs = inputs_of(folders["llama"], prompt, replace(WRITING, prompt=6, answer=2))
    with pytest.warns(RuntimeWarning, match="96 of 96 answers to learn are cut at 2 tokens"):
        rows = inputs.examples(task, "train")
    words = [inputs.processor.convert_ids_to_tokens(row["input_ids"]) for row in rows]
    assert {len(row) for row in words} == {8}
    assert {tuple(row[:2]) for row in words} == {("summarize", ":")}
    assert {tuple(row[4:]) for row in words} == {("it", "was", "it", "was")}
    whole = inputs_of(folders["llama"], prompt).examples(task, "train")
    assert all(row["labels"][-1] == inputs.processor.eos_token_id for row in whole)


def test_an_end_that_the_tokenizer_does_not_set_is_learned(
    folders: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    inputs = inputs_of(folders["t5"])
    inputs.processor = tiny_texts.tokenizer("llama")
    rows = inputs.examples(load_pairs(folders["data"], "summary"), "train")
    end = inputs.processor.eos_token_id
    assert all(row["labels"].index(end) == len(row["labels"]) - 1 for row in rows)
    assert not recwarn.list


def test_an_encoder_without_positions_reads_as_much_as_is_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    text = " ".join(["it"] * 99)
    for split in ("train", "validation"):
        line = json.dumps({"text": text, "summary": "it"})
        (tmp_path / f"{split}.jsonl").write_text(line + "\n")
    inputs = inputs_of(folders["t5"], "{text}", replace(WRITING, prompt=100))
    assert inputs.processor.model_max_length == 64
    (row,) = inputs.examples(load_pairs(tmp_path, "summary"), "train")
    assert len(row["input_ids"]) == 100  # with its end


# what is refused

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an encoder": ("minilm", {}, "'minilm' writes no texts, as 'data' asks for; give --model"),
    "no such column": ("t5", {"target_column": "sumary"}, "has no column 'sumary'"),
    "the target as text": (
        "t5",
        {"text_columns": ("summary",)},
        "'summary' is the label column",
    ),
    "labels, too": ("t5", {"label_column": "text"}, "target_column and label_column exclude"),
    "an unknown place": ("t5", {"prompt": "Q: {question}"}, "{question}, which is no text column"),
    "no place": ("t5", {"prompt": "Q:"}, "no column in braces; allowed: {text}"),
    "an empty prompt": ("t5", {"prompt": ""}, "no column in braces"),
    "too many tokens": (
        "llama",
        {"max_length": 60},
        "max_length and max_target_length are together 68, but",
    ),
    "too many tokens of a side": (
        "bart",
        {"max_length": 60, "max_target_length": 65},
        "the larger of max_length and max_target_length is 65, but",
    ),
    "no beams": ("t5", {"beams": 0}, "beams is 0; allowed"),
    "images": ("t5", {"image_size": 32}, "image_size is 32, but 'data' is of texts"),
    "classes": (
        "t5",
        {"balance": 0.5},
        "balance is 0.5, but the labels are texts, not classes; drop it",
    ),
    "a cache": ("t5", {"prefix_cache": "int8", "settings": {"frozen_below": 2}}, "is not kept"),
    "a new head": ("t5", {"method": "linear-probing"}, "it has embedding, layer, norm: set"),
    "a new head, and another": (
        "llama",
        {"method": "linear-probing", "max_length": 32},
        "this model has none (one that writes texts has no new head); it has embedding, layer, "
        "norm, lm_head: set always_train to one of these, or choose another method",
    ),
    "no task of texts": (
        "t5",
        {"target_column": None, "label_column": "summary"},
        "prompt is 'summarize : {text} \\n', but 'data' has labels and no texts to write; drop it",
    ),
    "half a stack": ("t5", {"keep_layers": 1}, "has no single stack of layers"),
}


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_inspection_prices_what_writing_costs(
    kind: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Against a step of a run with one component that trains, on texts of that many tokens."""
    assert call(monkeypatch, "inspect", "--model", str(folders[kind]), "--writes", "--json") == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    rows = json.loads(printed.out)
    model = tiny_texts.MODELS[kind]()
    batch = dict.fromkeys(("input_ids", "labels"), torch.zeros(32, 64, dtype=torch.long))
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    full = sum(counted_flops(model, batch))
    for component, row in zip(rgft.partition(model, "layer"), rows, strict=True):
        assert row["name"] == component.name
        own = {part.parameter for part in component.slices}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in own)
        alone = sum(counted_flops(model, batch))
        assert row["cost_alone"] == pytest.approx(alone / full, rel=1e-3)
    assert call(monkeypatch, "inspect", "--model", str(folders[kind])) == 0
    assert "a classifier of two classes (--writes:" in capfd.readouterr().out


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(
    case: str, spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, options, said = REFUSED[case]
    with pytest.raises(InputError) as caught:
        run(replace(spec, model=str(folders.get(model, model)), **options), tmp_path / "run")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_metric_of_labels_is_refused(spec: RunSpec, folders: dict[str, Path]) -> None:
    task = replace(load_pairs(folders["data"], "summary"), metric="accuracy")
    with pytest.raises(InputError, match="the metric of 'data' is 'accuracy'; allowed for texts"):
        load_inputs(spec, task)


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "blank": ({"text": "a", "summary": " "}, "row 2 has no text to learn in column 'summary'"),
    "missing": ({"text": "a"}, "row 2 has no text to learn in column 'summary' (None)"),
    "a number": ({"text": "a", "summary": 3}, "row 2 has no text to learn in column 'summary' (3)"),
    "nothing to choose": ({"text": "a", "summary": []}, "row 2 has no text to learn"),
    "a surrogate": ({"text": "a", "summary": "\ud800"}, "row 2 of column 'summary' is not valid"),
    "no input": ({"summary": "b"}, "1 of 3 rows have no text in column 'text'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_without_text_is_said(case: str, tmp_path: Path) -> None:
    row, said = BAD_ROWS[case]
    good = {"text": "a", "summary": "b"}
    lines = "".join(json.dumps(r) + "\n" for r in (good, row, good))
    (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises(InputError) as caught:
        load_pairs(tmp_path, "summary", ["text"])
    assert said in str(caught.value) and "\n" not in str(caught.value)
