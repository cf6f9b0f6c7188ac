"""Whole runs of the command on a tiny model: what they leave, and that they repeat exactly."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from rgft import metrics
from rgft.cli import app
from rgft.errors import InputError
from rgft.policies import POLICIES
from rgft.report.run import load_run
from rgft.signals import SIGNALS
from rgft.spec import RunSpec, arguments, command, from_arguments
from rgft.train import _anywhere, run
from runs import assert_same, call, finish, outcome, printed, record_of, start, warm_up

CONTRACT = {
    *("method", "config", "seed", "versions", "metrics", "history", "flops", "seconds"),
    *("peak_memory_bytes", "parameters", "task", "model", "lr", "command", "components"),
}


@pytest.fixture(scope="module")
def spec(tiny_model: Path, tiny_data: Path) -> RunSpec:
    given = {"model": str(tiny_model), "data": str(tiny_data), "evaluations": 4}
    return RunSpec(**given, epochs=2, batch_size=16, lr=1e-3)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def short(tiny_model: Path, small_data: Path) -> RunSpec:
    given = {"model": str(tiny_model), "data": str(small_data), "settings": {"every": 2}}
    return RunSpec(**given, epochs=2, batch_size=8, evaluations=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default method."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(spec, folder)
    return folder


def test_folder_is_complete(finished: Path) -> None:
    record = record_of(finished)
    assert record.keys() >= CONTRACT
    assert record["status"] == "finished"
    assert record["metrics"].keys() == {"validation", "test"}
    assert record["flops"].keys() == {"spent", "full", "share"}
    assert record["seconds"].keys() >= {"train", "processor", "overhead"}
    assert record["seconds"]["processor"] > 0
    assert 0 < record["seconds"]["overhead"] < record["seconds"]["train"]
    assert record["parameters"]["updated_per_step"]["mean"] == record["parameters"]["total"]
    left = {path.name for path in finished.iterdir()}
    assert left == {
        *("run.json", "error_map.parquet", "residuals.parquet", "error_map.png", "report.html"),
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (finished / "error_map.png").read_bytes().startswith(b"\x89PNG")
    assert load_run(finished) is not None


def test_history_is_over_steps_and_flops(finished: Path) -> None:
    record = record_of(finished)
    assert [look["step"] for look in record["history"]] == [2, 4, 6, 8, 10, 12, 14, 16]
    spent = [look["flops"] for look in record["history"]]
    assert spent == sorted(set(spent))
    assert spent[-1] == record["flops"]["spent"]
    assert record["history"][-1]["validation"] == record["metrics"]["validation"]


@pytest.mark.parametrize(
    ("batch", "epochs", "steps"),
    [
        (16, 2.0, [11, 16]),  # 8 an epoch: ten steps are more than one
        (2, 0.5, [20, 30]),  # 40 rows to validate
        (1, 0.5, [40, 60]),  # the same
        (16, 0.5, [4]),
    ],
)
def test_small_data_is_evaluated_less_often(
    batch: int, epochs: float, steps: list[int], spec: RunSpec, tmp_path: Path
) -> None:
    given = replace(spec, evaluations=None, method="full", batch_size=batch, epochs=epochs)
    assert [look["step"] for look in run(given, tmp_path)["history"]] == steps


def test_error_map_has_a_row_per_step_and_component(finished: Path) -> None:
    table = pd.read_parquet(finished / "error_map.parquet")
    names = [c["name"] for c in record_of(finished)["components"]]
    assert list(table["component"].unique()) == names
    assert sorted(table["step"].unique()) == list(range(1, 17))
    assert len(table) == 16 * len(names)


@pytest.mark.parametrize("method", ["full", "rgft-lora", "rgft-threshold"])
def test_saved_model_gives_the_metrics(method: str, spec: RunSpec, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415

    settings = {"warmup": 4, "every": 4} if method == "rgft-threshold" else {}
    record = run(replace(spec, method=method, lr=None, settings=settings), tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "bad", 1: "good"}
    text = (Path(spec.data or "") / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        answer = model(**batch, labels=labels)
    measured = metrics.compute("classification", answer.logits, labels)
    expected = dict(record["metrics"]["test"])
    assert answer.loss.item() == pytest.approx(expected.pop("loss"), rel=1e-4)
    summed = "calibration_error"  # of confidences that differ by rounding, as the loss does
    assert measured.pop(summed) == pytest.approx(expected.pop(summed), rel=1e-4)
    assert measured == expected


def test_lora_leaves_the_pairs_too(short: RunSpec, tmp_path: Path) -> None:
    record = run(replace(short, method="lora", settings={"lora_rank": 2}), tmp_path / "run")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name}
    assert ranks == {2}
    assert record["parameters"]["trainable"] < record["parameters"]["total"] / 2
    assert not any("lora" in name for name in load_file(tmp_path / "run" / "model.safetensors"))


def test_it_learns(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, epochs=12, evaluations=1), tmp_path / "run")
    assert record["metrics"]["test"]["accuracy"] > 0.9


def test_regression(tiny_model: Path, tmp_path: Path) -> None:
    data = tiny_run.build_data(tmp_path / "data", tiny_run.rated)
    spec = RunSpec(model=str(tiny_model), data=str(data), epochs=12, lr=3e-3, evaluations=1)
    record = run(replace(spec, batch_size=16), tmp_path / "run")
    assert record["metrics"]["test"]["pearson"] > 0.7
    assert set(record["metrics"]["test"]) == {"loss", "pearson", "spearman", "mse"}


def test_sentence_pairs_see_both_sentences(tiny_model: Path, tmp_path: Path) -> None:
    data = tiny_run.build_data(tmp_path / "data", tiny_run.paired)
    spec = RunSpec(model=str(tiny_model), data=str(data), method="full", epochs=1, evaluations=1)
    both = run(spec, tmp_path / "both")
    first = run(replace(spec, text_columns=("sentence1",)), tmp_path / "first")
    assert both["flops"]["full"] > first["flops"]["full"]
    assert first["arguments"]["text_columns"] == ["sentence1"]


def test_named_columns(tiny_model: Path, tmp_path: Path) -> None:
    def row(rng: Any) -> dict[str, Any]:
        plain = tiny_run.classified(rng)
        return {"title": "the film", "what": plain["text"], "side": plain["label"], "note": "a b"}

    data = tiny_run.build_data(tmp_path / "data", row)
    spec = RunSpec(model=str(tiny_model), data=str(data), method="full", epochs=1, evaluations=1)
    with pytest.raises(InputError, match="--label-column"):
        run(spec, tmp_path / "run")
    named = replace(spec, text_columns=("what",), label_column="side")
    assert run(named, tmp_path / "run")["status"] == "finished"


def test_same_seed_same_run_other_seed_other_run(
    spec: RunSpec, finished: Path, tmp_path: Path
) -> None:
    run(spec, tmp_path / "same")
    assert_same(finished, tmp_path / "same")
    other = run(replace(spec, seed=1), tmp_path / "other")
    assert other["train_loss"] != record_of(finished)["train_loss"]
    weights = [load_file(f / "model.safetensors") for f in (finished, tmp_path / "other")]
    assert not torch.equal(*(w["classifier.weight"] for w in weights))


FINE = {"policy=biases": "parameter", "policy=drop-backward": "block"}


@pytest.mark.parametrize(
    "setting",
    [
        *(f"signal={name}" for name in SIGNALS),
        *(f"policy={name}" for name in POLICIES),
        *("p=1", "p=inf", "alpha=0.5", "beta=0", "mean_one=true", "lag=false"),
        *("always_train=head,embedding", "bias_correction=true"),
    ],
)
def test_settings_of_the_command(
    setting: str, short: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", short.model, "--data", str(short.data), "--epochs", "1"]
    given += ["--batch-size", "8", "--evaluations", "1", "--set", "every=2", "--set", setting]
    given += ["--granularity", FINE[setting]] if setting in FINE else []
    assert call(monkeypatch, "train", *given, "--output-dir", str(tmp_path / "run")) == 0
    key, _, text = setting.partition("=")
    used = record_of(tmp_path / "run")["config"][key]
    expected = {"p=inf": None, "always_train=head,embedding": ["head", "embedding"]}
    assert used == (expected[setting] if setting in expected else _json(text))
    assert setting != "p=inf" or record_of(tmp_path / "run")["arguments"]["settings"]["p"] == "inf"


def test_a_bypass_in_a_run(short: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers: plans that train the lower one and not the upper one are drawn."""
    given = ["--model", short.model, "--data", str(short.data), "--epochs", "2", "--method"]
    given += ["random", "--set", "bypass=true", "--set", "every=2", "--set", "warmup=0"]
    given += ["--batch-size", "8", "--evaluations", "1"]
    assert call(monkeypatch, "train", *given, "--output-dir", str(tmp_path / "run")) == 0
    plain = [*given[: given.index("bypass=true") - 1], *given[given.index("bypass=true") + 1 :]]
    assert call(monkeypatch, "train", *plain, "--output-dir", str(tmp_path / "plain")) == 0
    bypassed, whole = (record_of(tmp_path / name) for name in ("run", "plain"))
    assert bypassed["config"]["bypass"] is True
    assert bypassed["flops"]["spent"] < whole["flops"]["spent"]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("block", "bert.encoder.layer.0.attention"),
        ("head", "bert.encoder.layer.1.attention.head.3"),
        ("parameter", "bert.embeddings.word_embeddings.weight"),
        (r"layer\.(\d+)", None),
    ],
)
def test_granularity(
    granularity: str, expected: str | None, short: RunSpec, tmp_path: Path
) -> None:
    record = run(replace(short, granularity=granularity), tmp_path / "run")
    names = [c["name"] for c in record["components"]]
    assert sum(c["numel"] for c in record["components"]) == record["parameters"]["total"]
    assert len(names) > 2
    assert expected is None or expected in names, names
    assert record["granularity"] == granularity


@pytest.mark.parametrize(("epochs", "steps"), [(0.3, 2), (1.5, 6), (1e-9, 1)])
def test_fractional_epochs(epochs: float, steps: int, short: RunSpec, tmp_path: Path) -> None:
    record = run(replace(short, method="full", epochs=epochs), tmp_path / "run")
    assert pd.read_parquet(tmp_path / "run" / "error_map.parquet")["step"].max() == steps
    assert record["metrics"]["validation"]["loss"] > 0


def test_batch_larger_than_the_data(short: RunSpec, tmp_path: Path) -> None:
    record = run(replace(short, method="full", batch_size=1000, evaluations=50), tmp_path / "run")
    assert [look["step"] for look in record["history"]] == [1, 2]


def test_flops_share(short: RunSpec, tmp_path: Path) -> None:
    assert run(replace(short, method="full"), tmp_path / "full")["flops"]["share"] == 1.0
    settings = {"warmup": 1, "every": 1, "top": 0.3, "probe_every": 4}
    partial = replace(short, method="rgft-threshold", settings=settings)
    record = run(partial, tmp_path / "threshold")
    assert record["flops"]["share"] < 1.0
    updated = record["parameters"]["updated_per_step"]
    assert updated["min"] < updated["mean"] < updated["max"]


def test_probes_are_spent_but_full_fine_tuning_has_none(short: RunSpec, tmp_path: Path) -> None:
    flops = {
        signal: run(replace(short, settings={"signal": signal, "every": 2}), tmp_path / signal)[
            "flops"
        ]
        for signal in ("fisher", "grad-norm")
    }
    assert flops["fisher"]["full"] == flops["grad-norm"]["full"]
    assert flops["fisher"]["spent"] > flops["grad-norm"]["spent"]


def test_second_run_in_a_folder_is_refused(short: RunSpec, tmp_path: Path) -> None:
    run(replace(short, method="lora"), tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        run(short, tmp_path / "run")
    assert (tmp_path / "run" / "adapter").is_dir()
    run(short, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "adapter").exists()
    assert record_of(tmp_path / "run")["method"] == "rgft"


def test_a_refused_overwrite_leaves_the_old_run(short: RunSpec, tmp_path: Path) -> None:
    run(short, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="signal"):
        run(replace(short, settings={"signal": "no"}), tmp_path / "run", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_resume_of_a_finished_run_shows_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.iterdir()}
    assert call(monkeypatch, "train", "--resume", "--output-dir", str(finished)) == 0
    printed = capsys.readouterr().out
    assert "of full fine-tuning" in printed
    said = f"this run had finished before, nothing to do; report: {finished / 'report.html'}"
    assert printed.splitlines()[-1] == said
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


def test_resume_writes_a_report_that_a_kill_prevented(finished: Path, spec: RunSpec) -> None:
    (finished / "report.html").unlink()
    run(spec, finished, resume=True)
    assert (finished / "report.html").stat().st_size > 1000


def test_resume_with_another_setting_is_refused(spec: RunSpec, finished: Path) -> None:
    with pytest.raises(InputError, match=r"batch_size was 16 .* is 8 now"):
        run(replace(spec, batch_size=8), finished, resume=True)


def test_more_epochs_are_a_run_from_the_model_in_another_folder(
    spec: RunSpec, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"epochs was 2 .* is 4 now") as refused:
        run(replace(spec, epochs=4), finished, resume=True)
    _, _, words = str(refused.value).partition("in another folder: ")
    assert shlex.split(words) == ["--model", str(finished), "--output-dir", "NEW"]
    # a rate too small to learn anything: what it can do, it has from the run before
    given = replace(spec, model=str(finished), method="full", epochs=1, lr=1e-9, seed=5)
    longer = run(given, tmp_path / "longer")
    before = record_of(finished)["metrics"]["test"]
    assert longer["metrics"]["test"]["loss"] == pytest.approx(before["loss"], rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resumes(
    number: signal.Signals, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    warm_up()
    given = ["--model", str(tiny_model), "--data", str(tiny_data), "--epochs", "8"]
    given += ["--batch-size", "4", "--evaluations", "1", "--set", "p=inf"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finish(start(["train", *given, "--output-dir", str(whole)], whole)) == 0
    process = start(["train", *given, "--output-dir", str(stopped)], stopped)
    while not list((stopped / "checkpoints").glob("checkpoint-*")):
        assert process.is_alive(), printed(stopped, "stderr")
        time.sleep(0.005)
    time.sleep(0.05)
    _send(process.pid, number)
    assert finish(process) == 1
    (line,) = printed(stopped, "stderr").splitlines()
    advice = line.partition("go on with: rgft ")[2]
    assert record_of(stopped)["status"] == "interrupted"
    assert 30 < record_of(stopped)["step"] < 240
    step, versions = record_of(stopped)["step"], record_of(stopped)["versions"]
    assert finish(start(shlex.split(advice), stopped)) == 0
    assert_same(whole, stopped)
    (resumed,) = record_of(stopped)["resumed"]
    assert (resumed["step"], resumed["versions"]) == (step, versions)
    assert resumed.keys() == {"step", "versions", "hardware", "code_revision"}


def test_interrupt_before_training(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    warm_up()
    output = tmp_path / "run"
    given = ["--model", str(tiny_model), "--data", str(tiny_data), "--output-dir", str(output)]
    process = start(["train", *given], output)
    while not output.with_name("run.stderr").exists():
        time.sleep(0.001)
    time.sleep(0.1)
    _send(process.pid, signal.SIGINT)
    assert finish(process) == 1
    assert "rgft: stopped" in printed(output, "stderr").splitlines()[-1]
    assert "Traceback" not in printed(output, "stderr")
    assert not list(output.glob(".*")) if output.exists() else True


def _send(pid: int | None, number: signal.Signals) -> None:
    assert pid is not None
    os.kill(pid, number)


def test_output_is_tidy(
    short: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", short.model, "--data", str(short.data), "--epochs", "2"]
    given += ["--batch-size", "8", "--evaluations", "1", "--output-dir", str(tmp_path / "[r] n")]
    assert call(monkeypatch, "train", *given, "--set", "every=2") == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("step 4 of 8: validation loss 0.")
    assert lines[1].startswith("step 8 of 8: validation loss 0.")
    assert lines[-1] == f"report: {tmp_path / '[r] n' / 'report.html'}"
    assert "{" not in out


@pytest.mark.filterwarnings("default")
def test_a_run_in_which_the_method_does_nothing_says_so(
    short: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", short.model, "--data", str(short.data), "--epochs", "1", "--method"]
    for method, said in (("rgft-threshold", 1), ("random", 1), ("full", 0)):
        assert (
            call(monkeypatch, "train", *given, method, "--output-dir", str(tmp_path / method)) == 0
        )
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == said
        assert all("note: no plan is decided in this run" in line for line in lines)
        assert record_of(tmp_path / method)["idle"] is bool(said)


@pytest.mark.filterwarnings("default")
def test_a_budget_that_ends_before_the_first_decision_says_so(
    short: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of 8 steps it may have 16, of which it pays for 4."""
    given = ["--model", short.model, "--data", str(short.data), "--epochs", "2", "--budget", "0.5"]
    given += ["--batch-size", "8", "--method", "rgft-threshold", "--set", "warmup=7"]
    assert call(monkeypatch, "train", *given, "--output-dir", str(tmp_path / "run")) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert "the budget ended before the method's first decision" in line
    assert record_of(tmp_path / "run")["idle"] is True


@pytest.mark.filterwarnings("default")
def test_notes_come_before_training(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = cycle(("good", "bad"))
    data = tiny_run.build_data(
        tmp_path / "data",
        lambda rng: {"text": rng.choice(tiny_run.FILLER), "label": next(labels)},
        {"train": 8, "validation": 8},
    )
    given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    given += ["--epochs", "1", "--balance", "1", "--prefix-cache", "int8"]
    with contextlib.redirect_stderr(sys.stdout):
        assert call(monkeypatch, "train", *given, "--set", "frozen_below=2") == 0
    notes = (
        "all classes are equally",
        "no sample is visited twice",
        "decision comes after step 10",
    )
    lines = capsys.readouterr().out.splitlines()[:4]
    for said, line in zip((*notes, "step 1 of 1"), lines, strict=True):
        assert said in line and line.startswith("rgft: note: ") == (said in notes)
    assert record_of(tmp_path / "o")["prefix_cache"] is None


SPECS = [
    RunSpec(data="my data", text_columns=("a, b", 'the "c"'), label_column="$HOME"),
    RunSpec(task="trec", method="rgft-lora", lr=1e-3, granularity=r"layer\.(\d+)|(pooler)"),
    RunSpec(
        task="trec",
        settings={"p": math.inf, "lag": True, "always_train": ("head", "x"), "signal": "rms"},
    ),
]


@pytest.mark.parametrize("spec", SPECS)
def test_command_is_read_back(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunSpec] = []

    def note(read: RunSpec, output: Path, **flags: bool) -> dict[str, Any]:
        seen.append(read)
        raise InputError("seen")

    monkeypatch.setattr("rgft.train.run", note)
    words = shlex.split(command(spec))
    assert words[0] == "rgft"
    with pytest.raises(InputError, match="seen"):
        app([*words[1:], "--output-dir", "o"], standalone_mode=False)
    assert arguments(seen[0]) == arguments(spec)
    kept = json.loads(json.dumps(arguments(spec)))
    assert from_arguments(kept, "run.json") == from_arguments(arguments(spec), "run.json")


def test_command_of_a_record_repeats_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(record_of(finished)["command"])
    assert call(monkeypatch, *words[1:], "--output-dir", str(tmp_path / "again")) == 0
    assert outcome(finished)["metrics"] == outcome(tmp_path / "again")["metrics"]


def test_command_of_a_report_repeats_the_run_as_it_stands(
    short: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working folder, though data and model were given by relative paths."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my data").symlink_to(str(short.data))
    (tmp_path / "model").symlink_to(short.model)
    monkeypatch.chdir(tmp_path)
    first = run(replace(short, data="my data", model="model", epochs=1), Path("a run"))
    page = (tmp_path / "a run" / "report.html").read_text(encoding="utf-8")
    words = shlex.split(html.unescape(page.split("<pre", 1)[1].split(">", 1)[1].split("<")[0]))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert words[:2] == ["rgft", "train"]
    assert call(monkeypatch, *words[1:]) == 0
    assert outcome(tmp_path / "a run-again")["metrics"] == first["metrics"]
    assert call(monkeypatch, "train", "--resume", "--output-dir", str(tmp_path / "a run")) == 0


def test_a_packaged_model_is_taken_though_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _anywhere(RunSpec(task="trec")) == RunSpec(task="trec")
    assert _anywhere(RunSpec(task="trec", model="a/hub-id")).model == "a/hub-id"


def test_every_field_has_an_option() -> None:
    options = {p.name for p in app.commands["train"].params}  # type: ignore[attr-defined]
    assert {f.name for f in fields(RunSpec)} <= options
