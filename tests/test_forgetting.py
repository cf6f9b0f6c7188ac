"""What is forgotten, against sentences one by one and tokens one by one."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import tiny_run
import tiny_texts
from rgft.bench.beyond_headline import forgetting
from rgft.bench.cells import Cell
from rgft.bench.checks import check_places
from rgft.bench.record import record_of_run
from rgft.bench.results import results
from rgft.errors import InputError
from rgft.printed import summary
from rgft.report.run import load_run
from rgft.spec import RunSpec, command
from rgft.tasks.general_text import load_general_text
from rgft.train import run
from runs import call

LONG = 24  # tokens of a window


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STS-B and WikiText-2 in their schemas on the hub, in the words of tiny models."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(1)
    rows = {"train": 4, "validation": 4, "test": 70}
    tiny_run.build_data(folder / "glue" / "stsb", rated_pair, rows)
    lines = [" ".join(rng.choices(tiny_texts.WORDS[4:], k=rng.randint(0, 9))) for _ in range(40)]
    articles = folder / "wikitext" / "wikitext-2-raw-v1"
    articles.mkdir(parents=True)
    for split in ("train", "test"):
        written = "\n".join(json.dumps({"text": line}) for line in lines)
        (articles / f"{split}.jsonl").write_text(f"{written}\n", encoding="utf-8")
    return folder


def rated_pair(rng: random.Random) -> dict[str, Any]:
    """Two texts of different lengths, and how many of three words they share."""
    words = rng.sample(tiny_run.GOOD + tiny_run.BAD, 6)
    shared = rng.randint(0, 3)
    second = [*words[:shared], *words[3 : 6 - shared], *rng.choices(tiny_run.FILLER, k=3)]
    return {"sentence1": " ".join(words[:3]), "sentence2": " ".join(second), "label": float(shared)}


@pytest.fixture(autouse=True)
def _data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_DATA", str(root))


@pytest.fixture
def spec(tiny_model: Path, small_data: Path) -> RunSpec:
    return RunSpec(model=str(tiny_model), data=str(small_data), method="full", epochs=4, lr=1e-2)


@pytest.fixture
def writer(tmp_path: Path) -> RunSpec:
    return RunSpec(
        model=str(tiny_texts.build_model(tmp_path / "llama", "llama")),
        data=str(tiny_texts.build_data(tmp_path / "texts")),
        target_column="summary",
        method="full",
        epochs=1,
        lr=1e-2,
        max_length=LONG - 8,
        max_target_length=8,
    )


def similarity(folder: Path, rows: Path) -> float:
    """Spearman's rho, each sentence by itself."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    lines = [json.loads(line) for line in rows.read_text().splitlines()]

    @torch.no_grad()
    def vector(text: str) -> Any:
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()

    cosines = []
    for line in lines:
        first, second = vector(line["sentence1"]), vector(line["sentence2"])
        cosines.append(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    return float(stats.spearmanr(cosines, [line["label"] for line in lines])[0])


def perplexity(folder: Path, rows: Path) -> float:
    """Token by token, each after those before it in its window."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    tokens = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(tokens) - LONG + 1, LONG):
        window = tokens[start : start + LONG]
        for end in range(1, LONG):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window[:end]])).logits[0, -1].double()
            losses.append(-float(torch.log_softmax(logits, 0)[window[end]]))
    return math.exp(sum(losses) / len(losses))


def test_an_encoder_is_asked_how_alike_sentences_are(
    spec: RunSpec, root: Path, tmp_path: Path
) -> None:
    record = run(replace(spec, forgetting=True), tmp_path / "run")
    rows = root / "glue" / "stsb" / "test.jsonl"
    found = record["forgetting"]
    assert (found["of"], found["metric"], found["rows"]) == ("stsb", "spearman", 70)
    assert found["before"] == pytest.approx(similarity(Path(spec.model), rows), abs=1e-3)
    assert found["after"] == pytest.approx(similarity(tmp_path / "run", rows), abs=1e-3)
    assert abs(found["before"] - found["after"]) > 1e-3
    assert load_run(tmp_path / "run").forgetting == (
        f"stsb: spearman {found['before']:.4g} before, {found['after']:.4g} after"
    )
    assert "forgetting" in [str(cell) for cell in summary(record).columns[0].cells]


def test_a_decoder_is_asked_to_predict_general_text(
    writer: RunSpec, root: Path, tmp_path: Path
) -> None:
    found = run(replace(writer, forgetting=True), tmp_path / "run")["forgetting"]
    rows = root / "wikitext" / "wikitext-2-raw-v1" / "test.jsonl"
    assert (found["of"], found["metric"]) == ("wikitext", "perplexity")
    assert found["before"] == pytest.approx(perplexity(Path(writer.model), rows), rel=1e-4)
    assert found["after"] == pytest.approx(perplexity(tmp_path / "run", rows), rel=1e-4)
    assert abs(found["after"] - found["before"]) > 1


@pytest.mark.parametrize("layers", [None, 1])
def test_it_changes_nothing_else(spec: RunSpec, tmp_path: Path, layers: int | None) -> None:
    spec = replace(spec, keep_layers=layers)
    plain = run(spec, tmp_path / "plain")
    measured = run(replace(spec, forgetting=True), tmp_path / "measured")
    assert plain["forgetting"] is None
    assert plain["flops"] == measured["flops"]
    assert plain["metrics"]["test"]["loss"] == measured["metrics"]["test"]["loss"]
    same_weights(tmp_path / "plain", tmp_path / "measured")


def same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["linear-probing", "lora", "adapters"])
def test_what_does_not_train_forgets_nothing(spec: RunSpec, tmp_path: Path, method: str) -> None:
    slow = replace(spec, method=method, lr=1e-12, forgetting=True)
    found = run(slow, tmp_path / method)["forgetting"]
    # new adapters are nearly, and not quite, the identity
    assert found["before"] == pytest.approx(
        found["after"], abs=0.1 if method == "adapters" else 1e-6
    )


def test_before_is_the_whole_model_where_layers_are_dropped(
    spec: RunSpec, root: Path, tmp_path: Path
) -> None:
    short = replace(spec, keep_layers=1, lr=1e-12, forgetting=True)
    found = run(short, tmp_path / "run")["forgetting"]
    rows = root / "glue" / "stsb" / "test.jsonl"
    assert found["before"] == pytest.approx(similarity(Path(spec.model), rows), abs=1e-3)
    assert found["after"] == pytest.approx(similarity(tmp_path / "run", rows), abs=1e-3)
    assert found["before"] != found["after"]


def test_a_run_with_a_budget_measures_the_whole_model_before(
    spec: RunSpec, root: Path, tmp_path: Path
) -> None:
    guided = replace(spec, method="rgft", budget="0.5", epochs=8, lr=None, seed=3)
    plain = run(guided, tmp_path / "plain")
    record = run(replace(guided, forgetting=True), tmp_path / "run")
    rows, found = root / "glue" / "stsb" / "test.jsonl", record["forgetting"]
    assert found["before"] == pytest.approx(similarity(Path(spec.model), rows), abs=1e-3)
    assert found["after"] == pytest.approx(similarity(tmp_path / "run", rows), abs=1e-3)
    assert plain["flops"] == record["flops"] and plain["layers"] == record["layers"]
    same_weights(tmp_path / "plain", tmp_path / "run")


@pytest.mark.parametrize("kind", ["similarity", "text"])
def test_mixed_precision_is_left_for_it(
    spec: RunSpec, writer: RunSpec, tmp_path: Path, kind: str
) -> None:
    """What is unchanged is found unchanged, to the digit."""
    given = spec if kind == "similarity" else writer
    still = replace(given, lr=1e-12, precision="bfloat16", forgetting=True)
    found = run(still, tmp_path / "run")["forgetting"]
    assert found["after"] == pytest.approx(found["before"], rel=1e-6)


def test_a_run_that_goes_on_says_the_same(spec: RunSpec, tmp_path: Path) -> None:
    whole = run(replace(spec, forgetting=True, evaluations=1), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rgft.train.outcome", interrupted)
        run(replace(spec, forgetting=True, evaluations=1), tmp_path / "run")
    again = run(replace(spec, forgetting=True, evaluations=1), tmp_path / "run", resume=True)
    assert again["resumed"] and again["forgetting"] == whole["forgetting"]


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt


def test_the_bench_shows_it(spec: RunSpec, tmp_path: Path) -> None:
    asked = replace(spec, forgetting=True)
    assert "--forgetting" in command(asked)
    run(asked, tmp_path / "run")
    labels = {"suite": "s", "model": "m", "task": "t", "arm": "full", "budget": 1.0, "rate": 1e-2}
    record = {**record_of_run(tmp_path / "run"), **labels, "key": "k", "status": "finished"}
    (row,) = forgetting(results([record])).rows
    told = record["forgetting"]
    before, after = 100 * told["before"], 100 * told["after"]
    assert row == ["t", "1", "full", "stsb, spearman", f"{before:.1f}", f"{after:.1f}",
                   f"{after - before:+.1f}", "1", "0"]  # fmt: skip
    (row,) = forgetting(results([{**record, "forgetting": {**told, "after": None}}])).rows
    assert row[4:] == ["-", "-", "-", "0", "1"]
    assert forgetting(results([{**record, "forgetting": None}])).rows == []


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_of_an_encoder_with_a_decoder_nothing_is_measured(
    writer: RunSpec, tmp_path: Path, kind: str
) -> None:
    model = tiny_texts.build_model(tmp_path / kind, kind)
    with pytest.raises(InputError, match="not of an encoder with a decoder; drop it"):
        run(replace(writer, model=str(model), forgetting=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_trained_on_sts_b_is_not_untaught(spec: RunSpec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stsb, which this run trains on; drop it"):
        run(replace(spec, task="stsb", data=None, forgetting=True), tmp_path / "run")


@pytest.mark.parametrize("task", ["stsb", "wikitext"])
def test_a_bench_looks_for_its_data_before_it_starts(
    spec: RunSpec, writer: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setenv("RGFT_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = replace(spec if task == "stsb" else writer, forgetting=True)
    one = Cell("k", {"arm": "full", "task": "mine"}, given)
    with pytest.raises(InputError, match=f"task '{task}' is not on this machine"):
        check_places([one])


def test_general_text_needs_its_test_split_alone(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data" / "wikitext"
    folder.mkdir(parents=True)
    monkeypatch.setenv("RGFT_DATA", str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"wikitext has no test file; give one called test\."):
        load_general_text()
    text = (root / "wikitext" / "wikitext-2-raw-v1" / "test.jsonl").read_text(encoding="utf-8")
    (folder / "test.jsonl").write_text(text, encoding="utf-8")
    lines = [json.loads(line)["text"] for line in text.splitlines()]
    assert load_general_text() == "\n\n".join(lines)
    assert call(monkeypatch, "data", "fetch", "wikitext") == 0
    assert f"wikitext: test {len(load_general_text()):,} characters" in capsys.readouterr().out


def test_missing_data_is_told_before_training(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGFT_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="task 'stsb' is not on this machine"):
        run(replace(spec, forgetting=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_that_fills_no_window_is_refused(writer: RunSpec, tmp_path: Path) -> None:
    long = replace(writer, model=str(longer(tmp_path)), max_length=1000, forgetting=True)
    with pytest.raises(InputError, match="less than the 1008 of max_length"):
        run(long, tmp_path / "run")


def longer(folder: Path) -> Path:
    """The tiny decoder, with more positions than the text has."""
    model = folder / "llama"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return model
