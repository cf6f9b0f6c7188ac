"""Input that cannot be used: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rgft
import tiny_images
import tiny_run
from rgft.error_map import ErrorMap
from rgft.errors import InputError
from rgft.folder_lock import held
from rgft.records import read_run
from rgft.spec import RunSpec
from rgft.train import run
from runs import call

Files = dict[str, str | bytes]
TEXT = "".join(
    json.dumps({"text": f"the {noun} was {word}", "label": label}) + "\n"
    for noun in ("film", "plot", "scene")
    for word, label in (("fine", "good"), ("dull", "bad"))
)
GOOD_DATA: Files = {f"{name}.jsonl": TEXT for name in ("train", "validation", "test")}


def assert_refused(
    code: int, capture: pytest.CaptureFixture[str], said: str, output: Path | None = None
) -> None:
    """Exit code 2, one line that says `said`, and nothing in the output folder."""
    out, err = capture.readouterr()
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("rgft: ")
    assert said in err
    assert "Traceback" not in out + err
    assert output is None or not output.exists() or not list(output.iterdir())


def write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(raw)
    return folder


OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown task": (["--task", "no-such"], "no-such"),
    "unknown method": (["--method", "rgtf"], "unknown method 'rgtf' (did you mean 'rgft'?)"),
    "unknown option": (["--metod", "rgft"], "(see `rgft train --help`)"),
    "option without its value": (["--method"], "--method"),
    "option that is no number": (["--epochs", "x"], "(see `rgft train --help`)"),
    "argument too many": (["extra"], "extra"),
    "unknown key": (["--set", "betta=0.5"], "'betta' (did you mean 'beta'?)"),
    "key of an option": (["--set", "seed=3"], "seed"),
    "set without value": (["--set", "beta"], "KEY=VALUE"),
    "set without key": (["--set", "=3"], "KEY=VALUE"),
    "key set twice": (["--set", "beta=0.5", "--set", "beta=0.6"], "beta twice"),
    "beta is text": (["--set", "beta=abc"], "beta is 'abc'"),
    "beta is 1": (["--set", "beta=1"], "beta is 1"),
    "beta is nan": (["--set", "beta=NaN"], "beta is nan"),
    "beta is a list": (["--set", "beta=[1]"], "beta is [1]"),
    "beta is null": (["--set", "beta=null"], "beta is None"),
    "alpha is negative": (["--set", "alpha=-1"], "alpha is -1"),
    "alpha is infinite": (["--set", "alpha=inf"], "alpha is inf"),
    "alpha is a truth": (["--set", "alpha=true"], "alpha is True"),
    "p is 3": (["--set", "p=3"], "p is 3"),
    "top is 0": (["--set", "top=0"], "top is 0"),
    "top is 2": (["--set", "top=2"], "top is 2"),
    "every is 0": (["--set", "every=0"], "every is 0"),
    "every is 1.5": (["--set", "every=1.5"], "every is 1.5"),
    "lag is Python's": (["--set", "lag=False"], "lag is 'False'"),
    "mean_one is a number": (["--set", "mean_one=1"], "mean_one is 1"),
    "always_train is a number": (["--set", "always_train=3"], "always_train is 3"),
    "engagement": (["--set", "engagement=maybe"], "engagement is 'maybe'"),
    "unknown signal": (["--set", "signal=loudness"], "loudness"),
    "signal is a list": (["--set", "signal=[1]"], "signal is [1]"),
    "unknown policy": (["--set", "policy=none"], "none"),
    "method as policy": (["--set", "policy=llrd"], "goes to --method or rgft.find_method"),
    "unfreezing by 0": (
        ["--method", "gradual-unfreezing", "--set", "unfrozen_by=0"],
        "unfrozen_by",
    ),
    "unfreezing by a word": (["--set", "unfrozen_by=half"], "unfrozen_by is 'half'"),
    "rank without pairs": (["--set", "lora_rank=4"], "lora_rank"),
    "rank alone": (["--method", "galore", "--set", "rank=4"], "(did you mean 'galore_rank'?)"),
    "rank of pairs": (["--method", "lora", "--set", "rank=4"], "(did you mean 'lora_rank'?)"),
    "default of another policy": (
        ["--method", "badam", "--set", "active=2"],
        "active has no effect on the policy 'badam', whose settings are: none (active is for lisa, "
        "grass); drop it",
    ),
    "default of another signal": (
        ["--set", "probe_samples=16"],
        "probe_samples has no effect on the signal 'grad-norm'",
    ),
    "stay of those in turn": (
        ["--method", "badam", "--set", "min_stay=99"],
        "(min_stay is for policies that freeze, but not in turns)",
    ),
    "probes of what is drawn": (
        ["--method", "random", "--set", "probe_every=2"],
        "(probe_every is for policies that freeze by error)",
    ),
    "rank is 0": (["--method", "lora", "--set", "lora_rank=0"], "lora_rank is 0"),
    "rank is a truth": (["--method", "lora", "--set", "lora_rank=true"], "lora_rank is True"),
    "projection of no method": (
        ["--set", "galore_rank=4"],
        "galore_rank has no effect on the method",
    ),
    "rank of a projection": (["--method", "galore", "--set", "galore_rank=0"], "galore_rank is 0"),
    "projection to nothing less": (
        ["--method", "galore", "--set", "galore_rank=1000"],
        "galore_rank is 1000; allowed: below 32",
    ),
    "scale of a projection": (
        ["--method", "galore", "--set", "galore_scale=big"],
        "galore_scale is 'big'; allowed: a number > 0",
    ),
    "no lag and freezing": (["--method", "suffix", "--set", "lag=false"], "lag=False"),
    "no lag and selection": (["--method", "rgft-threshold", "--set", "lag=false"], "lag=False"),
    "epochs is 0": (["--epochs", "0"], "epochs is 0"),
    "epochs is negative": (["--epochs", "-1"], "epochs is -1"),
    "epochs is nan": (["--epochs", "nan"], "epochs is nan"),
    "epochs is infinite": (["--epochs", "inf"], "epochs is inf"),
    "lr is 0": (["--lr", "0"], "lr is 0"),
    "lr is negative": (["--lr", "-1"], "lr is -1"),
    "lr is nan": (["--lr", "nan"], "lr is nan"),
    "lr is text": (["--lr", "abc"], "abc"),
    "seed is negative": (["--seed", "-1"], "seed is -1"),
    "seed is too large": (["--seed", str(2**32)], "seed is"),
    "batch size": (["--batch-size", "0"], "batch_size is 0"),
    "no beams": (["--beams", "0"], "beams is 0; allowed: a whole number >= 1"),
    "a prompt for labels": (["--prompt", "{text}"], "has labels and no texts to write; drop it"),
    "texts and labels": (
        ["--target-column", "text", "--label-column", "label"],
        "target_column and label_column exclude each other",
    ),
    "no such target": (["--target-column", "summary"], "has no column 'summary'"),
    "texts of an encoder": (["--target-column", "label"], "writes no texts, as"),
    "budget is more than all": (["--budget", "1.5"], "budget is '1.5'; allowed: a share"),
    "budget is a percentage": (["--budget", "30%"], "budget is '30%'; allowed: a share"),
    "skip is all": (["--budget", "0.5", "--skip", "1"], "skip is 1.0; allowed: in [0, 1)"),
    "skip without a budget": (["--skip", "0.5"], "skip takes effect with a budget alone"),
    "group by length without a budget": (
        ["--group-by-length"],
        "group_by_length takes effect with a budget alone",
    ),
    "cache format": (["--prefix-cache", "float8"], "prefix_cache is 'float8'; allowed: one of"),
    "cache and nothing frozen": (
        ["--prefix-cache", "int8", "--method", "full"],
        "prefix_cache is 'int8', but the method 'full' freezes no layer",
    ),
    "layers that are not there": (
        ["--keep-layers", "9"],
        "keep_layers is 9; this model has 2: give 1 to 2",
    ),
    "balance": (["--balance", "2"], "balance is 2.0; allowed: in [0, 1]"),
    "precision": (["--precision", "fp8"], "precision is 'fp8'; allowed: one of"),
    "budget is automatic": (["--budget", "automatic"], "or 2h, or auto"),
    "budget is nothing": (["--budget", "0min"], "budget is '0min'; allowed: a share"),
    "rate at the end of no budget": (
        ["--set", "policy=purchase", "--set", "rate_end=0.5"],
        "rate_end is what rate becomes by the end of a budget, and there is none",
    ),
    "rate": (["--set", "policy=purchase", "--set", "rate=0"], "rate is 0"),
    "rate at the end": (
        ["--set", "policy=purchase", "--set", "rate_end=2"],
        "rate_end is 2.0; allowed: in (0, 1]",
    ),
    "rate at the end of another policy": (["--set", "rate_end=0.5"], "rate_end has no effect"),
    "bypass and nothing frozen": (["--set", "bypass=true"], "bypass=True has no effect"),
    "bypass is a word": (["--set", "bypass=yes"], "bypass is 'yes'; allowed: true or false"),
    "frozen below the head": (["--set", "frozen_below=-1"], "frozen_below is -1"),
    "frozen above all layers": (["--set", "frozen_below=9"], "no layer would train"),
    "max length": (["--max-length", "1"], "max_length is 1"),
    "no training rows": (["--max-train-rows", "0"], "max_train_rows is 0; allowed"),
    "all training rows": (["--max-train-rows", "6"], "but there are 6 training rows"),
    "evaluations": (["--evaluations", "0"], "evaluations is 0"),
    "granularity with a typo": (["--granularity", "layr"], "layr"),
    "granularity is no expression": (["--granularity", "layer("], "layer("),
    "pairs without LoRA": (["--granularity", "lora"], "lora"),
    "missing text column": (["--text-columns", "body"], "body"),
    "three text columns": (["--text-columns", "a,b,c"], "text columns"),
    "no text column": (["--text-columns", ""], "text columns"),
    "label as text": (["--text-columns", "label"], "label"),
    "missing label column": (["--label-column", "stars"], "stars"),
    "label column of a task": (["--task", "trec", "--label-column", "x"], "--label-column"),
    "resume and overwrite": (["--resume", "--overwrite"], "exclude each other"),
    "nothing to resume": (["--resume"], "holds no run"),
    "model is a file": (["--model", __file__], "is a file; give the folder that holds the model"),
    "model is empty": (["--model", ""], "model is ''; allowed: a name or a folder"),
    "data is empty": (["--data", ""], "data is ''; allowed: a name or a folder"),
    "output folder is empty": (["--output-dir", ""], "it is empty; give a path"),
    "budget with a comma": (["--budget", "0,3"], "budget is '0,3'; allowed: a share"),
    "a text column twice": (["--text-columns", "text,text"], "two different ones"),
    "extension is a folder": (["--extend", "."], "is no file; give --extend a Python file"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options, said = OPTIONS[name]
    data = write(tmp_path / "data", GOOD_DATA)
    given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    code = call(monkeypatch, "train", *given, *options)
    assert_refused(code, capfd, said, tmp_path / "o")


COMMANDS: dict[str, tuple[list[str], str]] = {
    "misspelt command": (["trian"], "Did you mean 'train'? (see `rgft --help`)"),
    "no output folder": (["train", "--task", "trec"], "--output-dir"),
    "neither task nor data": (["train", "--output-dir", "o"], "no data"),
    "unknown task to fetch": (["data", "fetch", "tre"], "'tre' (did you mean 'trec'?)"),
    "nothing to fetch": (["data", "fetch"], "(see `rgft data fetch --help`)"),
    "unknown model to inspect": (["inspect", "--model", "./no-such"], "./no-such"),
    "name that no hub takes": (["inspect", "--model", "a b"], "the hub refuses it"),
    "file of a model to inspect": (["inspect", "--model", __file__], "is a file; give the folder"),
    "nothing to report": (["report", "none", "--output", "x.html"], "none holds no records"),
    "report is a folder": (["report", "none", "--output", "."], ". is a folder; give --output a"),
    "one file for two": (
        ["report", "x", "--output", "x.md", "--markdown", "x.md"],
        "--output and --markdown are both x.md; give two files",
    ),
    "no folder of a report": (["report", "x", "--output", "a/x.html"], "there is no folder a;"),
    "empty name of a report": (["report", "x", "--output", ""], "it is empty; give a path"),
    "tables are a folder": (["maps", "none", "--markdown", "."], ". is a folder; give --markdown"),
    "maps of nothing": (["maps", "none"], "none holds no records"),
    "suite is not there": (["bench", "s.yaml", "--output-dir", "o"], "s.yaml does not exist"),
    "no folder of a bench": (["bench", "s.yaml", "--output-dir", ""], "it is empty; give a path"),
    "granularity to inspect": (["inspect", "--granularity", "layr"], "layr"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, said = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    assert_refused(call(monkeypatch, *arguments), capfd, said, tmp_path / "o")


def _without(name: str) -> Files:
    return {file: content for file, content in GOOD_DATA.items() if file != name}


DATA: dict[str, tuple[Files, str]] = {
    "empty folder": ({}, "no training file"),
    "no training file": (_without("train.jsonl"), "no training file"),
    "empty split": ({**GOOD_DATA, "validation.jsonl": ""}, "validation.jsonl"),
    "two files of a split": ({**GOOD_DATA, "train.csv": "text,label\na,b\n"}, "train.csv"),
    "no label column": (
        {"train.jsonl": '{"text": "a"}\n{"text": "b"}\n'},
        "none is called label, labels, target",
    ),
    "no label in test": ({**GOOD_DATA, "test.jsonl": '{"text": "a"}\n'}, "test.jsonl"),
    "new label in test": (
        {**GOOD_DATA, "test.jsonl": '{"text": "a", "label": "odd"}\n'},
        "odd",
    ),
    "new label in validation": (
        {**GOOD_DATA, "validation.jsonl": '{"text": "a", "label": "odd"}\n'},
        "odd",
    ),
    "label is nan": (
        {"train.jsonl": '{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n'},
        "train.jsonl",
    ),
    "label is missing": (
        {"train.jsonl": '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n'},
        "train.jsonl",
    ),
    "text is missing": (
        {"train.jsonl": TEXT + '{"text": null, "label": "bad"}\n'},
        "train.jsonl",
    ),
    "broken line": ({"train.jsonl": TEXT + '{"text": "a", \n'}, "line 7"),
    "not objects": ({"train.jsonl": "[1, 2]\n3\n"}, "train.jsonl"),
    "uneven CSV": ({"train.csv": "text,label\na,x\nb,y,z\n"}, "row 2"),
    "open quote": ({"train.csv": 'text,label\n"a,x\nb,y\n'}, "train.csv"),
    "truncated parquet": ({"train.parquet": b"PAR1\x15\x04\x15"}, "train.parquet"),
    "empty parquet": ({"train.parquet": b""}, "train.parquet"),
    "not UTF-8": ({"train.jsonl": b'{"text": "caf\xe9", "label": "x"}\n'}, "UTF-8"),
    "one class": ({"train.jsonl": TEXT.replace("good", "bad")}, "two different"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files, said = DATA[name]
    data = write(tmp_path / "data", files)
    given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    assert_refused(call(monkeypatch, "train", *given), capfd, said, tmp_path / "o")


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_data_folder(
    kind: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if kind == "file":
        (tmp_path / "data").write_text("")
    given = ["--model", str(tiny_model), "--data", str(tmp_path / "data")]
    code = call(monkeypatch, "train", *given, "--output-dir", str(tmp_path / "o"))
    assert_refused(code, capfd, "train.jsonl, train.json, train.csv or train.parquet")


def test_wrong_text_columns_are_said_before_the_label_is_looked_for(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "data", {"train.csv": "what,side\na,b\n"})
    given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    code = call(monkeypatch, "train", *given, "--text-columns", "text")
    assert_refused(code, capfd, "has no column 'text'", tmp_path / "o")


PLACES: dict[str, tuple[str, str]] = {
    "no such model": ("models: [./modle]\ntasks: [data]", "there is no model folder ./modle"),
    "model of something else": (
        "models: [pictures]\ntasks: [data]",
        "is a model of images, but 'data' is a task of texts",
    ),
    "no such label column": (
        "models: [model]\ntasks: [data, {name: other, data: data, label_column: stars}]",
        "arm full on other: {data}/train.jsonl has no column 'stars'",
    ),
    "no such text column": (
        "models: [model]\ntasks: [{name: data, text_columns: body}]",
        "has no column 'body'",
    ),
    "more rows than there are": (
        "models: [model]\ntasks: [data]\nrows: 7",
        "but there are 6 training rows",
    ),
}


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("name", PLACES)
def test_what_no_cell_could_load_is_said_before_the_first(
    name: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places, said = PLACES[name]
    data = write(tmp_path / "data", GOOD_DATA)
    tiny_run.build_model(tmp_path / "model")
    tiny_images.build_model(tmp_path / "pictures")
    text = f"{places}\nseeds: [0]\nbudgets: [0.5, 1]\narms: {{full: {{}}, rgft: {{}}}}\n"
    (tmp_path / "suite.yaml").write_text(text)
    capfd.readouterr()
    given = [str(tmp_path / "suite.yaml"), "--output-dir", str(tmp_path / "o")]
    code = call(monkeypatch, "bench", *given, *options)
    assert_refused(code, capfd, said.format(data=data), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def _damage(**files: str | bytes | None) -> Callable[[Path], None]:
    """Replaces files of a model; bytes cut a file to its first bytes, None removes it."""

    def damage(folder: Path) -> None:
        for key, content in files.items():
            path = folder / key.replace("_DOT_", ".")
            if content is None:
                path.unlink()
            elif isinstance(content, bytes):
                path.write_bytes(path.read_bytes()[: int(content)])
            else:
                path.write_text(content)

    return damage


MODELS: dict[str, Callable[[Path], None]] = {
    "no config": _damage(config_DOT_json=None),
    "garbage config": _damage(config_DOT_json="{{{"),
    "config is a list": _damage(config_DOT_json="[1, 2]"),
    "config is empty": _damage(config_DOT_json="{}"),
    "unknown architecture": _damage(config_DOT_json='{"model_type": "perpetuum"}'),
    "no classifier of it": _damage(config_DOT_json='{"model_type": "clip"}'),
    "hidden size is text": _damage(config_DOT_json='{"model_type": "bert", "hidden_size": "x"}'),
    "no weights": _damage(model_DOT_safetensors=None),
    "truncated weights": _damage(model_DOT_safetensors=b"4000"),
    "weights without header": _damage(model_DOT_safetensors=b"4"),
    "empty weights": _damage(model_DOT_safetensors=b"0"),
    "garbage tokenizer": _damage(tokenizer_DOT_json="{{{"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", GOOD_DATA)
    model = tiny_run.build_model(tmp_path / "model")
    MODELS[name](model)
    capfd.readouterr()
    given = ["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    assert_refused(call(monkeypatch, "train", *given), capfd, str(model), tmp_path / "o")


def test_code_beside_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", GOOD_DATA)
    model = tiny_run.build_model(tmp_path / "model")
    ran = tmp_path / "ran"
    (model / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n")
    for name, classes in (
        ("config.json", ("AutoConfig", "AutoModelForSequenceClassification")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        config = json.loads((model / name).read_text())
        config |= {"model_type": "theirs", "auto_map": dict.fromkeys(classes, "theirs.Theirs")}
        (model / name).write_text(json.dumps(config))
    capfd.readouterr()
    given = ["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    code = call(monkeypatch, "train", *given)
    assert_refused(code, capfd, "is never run", tmp_path / "o")
    assert not ran.exists()


FAILURES: dict[str, tuple[BaseException, int]] = {
    "missing": (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2),
    "no right": (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2),
    "no folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), 2),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 2),
    "broken pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
    "input/output": (OSError(errno.EIO, "Input/output error"), 1),
    "memory of the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), 1),
    "memory": (MemoryError(), 1),
    "memory of an accelerator": (torch.OutOfMemoryError("tried to allocate 2 GiB"), 1),
    "memory of the host": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_of_the_machine_is_a_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error, expected = FAILURES[name]

    def fail(*given: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr("rgft.inspection.inspect_model", fail)
    assert call(monkeypatch, "inspect") == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rgft: ")


def test_an_error_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **settings: object) -> None:
        raise RuntimeError("of the program")

    monkeypatch.setattr("rgft.inspection.inspect_model", fail)
    with pytest.raises(RuntimeError, match="of the program"):
        call(monkeypatch, "inspect")


@pytest.mark.parametrize("arguments", [["data"], ["inspect", "--json"]])
def test_reader_that_has_gone(arguments: list[str]) -> None:
    """As in `rgft data | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "rgft.cli", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    os.close(writing)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "broken pipe" in line


@pytest.mark.parametrize("model", ["./no-such", "/no/such/model", "a/b/c"])
def test_missing_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", GOOD_DATA)
    given = ["--model", model, "--data", str(data), "--output-dir", str(tmp_path / "o")]
    assert_refused(call(monkeypatch, "train", *given), capfd, model, tmp_path / "o")


def test_granularity_head_on_a_model_without_heads() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(InputError, match="head"):
        rgft.partition(model, "head")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process."""
    return subprocess.run(
        [sys.executable, "-m", "rgft.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("offline", ["0", "1"])
def test_unreachable_hub_is_said_at_once(offline: str, tmp_path: Path) -> None:
    """Asked once: on a loopback port where nothing listens, whatever network there is."""
    data = write(tmp_path / "data", GOOD_DATA)
    given = ["--model", "nobody/no-such", "--data", str(data), "--output-dir", str(tmp_path / "o")]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = command("train", *given, HF_HUB_OFFLINE=offline, **nowhere)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "'nobody/no-such': no such folder is here, and the hub cannot be reached" in line
    assert "rrno" not in line
    assert "Retrying" not in line
    assert not (tmp_path / "o").exists()


def test_output_folder_is_a_file(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "data", GOOD_DATA)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no-such")):
        given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(output)]
        assert_refused(call(monkeypatch, "train", *given), capfd, str(output))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("which", ["model", "data"])
def test_output_folder_is_an_input(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", GOOD_DATA)
    model = tiny_run.build_model(tmp_path / "model")
    before = {p: p.read_bytes() for f in (model, data) for p in f.iterdir()}
    capfd.readouterr()
    given = ["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / which)]
    assert_refused(call(monkeypatch, "train", *given, "--overwrite"), capfd, which)
    assert {p: p.read_bytes() for f in (model, data) for p in f.iterdir()} == before


@pytest.mark.parametrize("rows", [tiny_run.classified, tiny_run.rated])
def test_divergence(
    rows: Any,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tiny_run.build_data(tmp_path / "data", rows)
    given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(tmp_path / "o")]
    given += ["--lr", "1e30", "--epochs", "2", "--evaluations", "1", "--batch-size", "16"]
    code = call(monkeypatch, "train", *given)
    assert_refused(code, capfd, "give a lower --lr", tmp_path / "o")


def interrupted(spec: RunSpec, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stopped after its second checkpoint."""
    from rgft.recorder import StopOnSignal  # noqa: PLC0415

    def stop(self: StopOnSignal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.stopped = True
            control.should_training_stop = True

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stop)
        assert run(spec, output)["status"] == "interrupted"
    assert len(list((output / "checkpoints").iterdir())) == 2


@pytest.fixture
def stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunSpec, Path]:
    """Checkpoints at steps 2 and 3... of 8; its data may be changed."""
    data = tiny_run.build_data(tmp_path / "data", rows={"train": 32, "validation": 8})
    given = {"model": str(tiny_model), "data": str(data), "settings": {"every": 2}}
    spec = RunSpec(**given, epochs=2, batch_size=8, evaluations=4)  # type: ignore[arg-type]
    interrupted(spec, tmp_path / "o", monkeypatch)
    return spec, tmp_path / "o"


RECORDS = {
    "empty": "",
    "cut off": '{"schema": 1, "status": "runn',
    "a list": "[]",
    "another schema": '{"schema": 99}',
    "no arguments": '{"schema": 1, "status": "running"}',
    "arguments of another kind": '{"schema": 1, "status": "running", "arguments": {"x": 1}}',
    "arguments are a list": '{"schema": 1, "status": "running", "arguments": [1]}',
    "bytes": "\x00\xff",
}


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = write(tmp_path / "o", {"run.json": RECORDS[name].encode("latin-1")})
    code = call(monkeypatch, "train", "--resume", "--output-dir", str(output))
    assert_refused(code, capfd, "rgft: ")
    assert (output / "run.json").read_bytes() == RECORDS[name].encode("latin-1")


def test_resume_after_the_data_changed(
    stopped: tuple[RunSpec, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spec, output = stopped
    before = sorted(output.rglob("*"))
    with (Path(spec.data or "") / "train.jsonl").open("a") as file:
        file.write('{"text": "a warm scene", "label": "good"}\n')
    capfd.readouterr()
    code = call(monkeypatch, "train", "--resume", "--output-dir", str(output))
    assert_refused(code, capfd, "data has changed")
    assert sorted(output.rglob("*")) == before


def test_resume_with_another_seed(
    stopped: tuple[RunSpec, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    code = call(monkeypatch, "train", "--resume", "--seed", "5", "--output-dir", str(stopped[1]))
    assert_refused(code, capfd, "seed was 0")


def test_resume_with_what_was_not_given(
    stopped: tuple[RunSpec, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    given = ["--resume", "--output-dir", str(stopped[1])]
    code = call(monkeypatch, "train", *given, "--budget", "0.5")
    assert_refused(code, capfd, "budget was not given in the run to resume and is '0.5' now")


def test_a_folder_in_which_a_run_is_under_way(
    stopped: tuple[RunSpec, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spec, output = stopped
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    capfd.readouterr()
    with held(output):  # as another process would
        code = call(monkeypatch, "train", "--resume", "--output-dir", str(output))
        assert_refused(code, capfd, "another process is running in")
        with pytest.raises(InputError, match="another process is running in"):
            run(spec, output, overwrite=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_resume_without_a_whole_checkpoint_starts_anew_without_what_was_cached(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tiny_run.build_data(tmp_path / "data", rows={"train": 64, "validation": 8})
    spec = RunSpec(
        **{"model": str(tiny_model), "data": str(data), "budget": "0.9"},
        **{"method": "rgft", "settings": {"every": 2, "frozen_below": 2}},
        **{"epochs": 3, "batch_size": 8, "evaluations": 4},
    )
    whole = run(spec, tmp_path / "whole")
    interrupted(spec, tmp_path / "o", monkeypatch)
    for path in (tmp_path / "o").glob("checkpoints/checkpoint-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    capfd.readouterr()
    assert call(monkeypatch, "train", "--resume", "--output-dir", str(tmp_path / "o")) == 0
    assert "there is no whole checkpoint: the run starts from the beginning" in "".join(
        capfd.readouterr()
    )
    again = read_run(tmp_path / "o")
    assert again["prefix_cache"] == whole["prefix_cache"]
    assert again["metrics"] == whole["metrics"] and again["flops"] == whole["flops"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_damaged_checkpoint_falls_back(
    name: str, whole: bool, stopped: tuple[RunSpec, Path], tmp_path: Path
) -> None:
    """To the one before, and without one to the start: with the same result in any case."""
    spec, output = stopped
    checkpoints = sorted((output / "checkpoints").iterdir())
    for folder in checkpoints[1 if whole else 0 :]:
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    resumed = run(spec, output, resume=True)
    straight = run(spec, tmp_path / "straight")
    assert resumed["metrics"] == straight["metrics"]
    assert resumed["train_loss"] == straight["train_loss"]


@pytest.mark.parametrize("megabytes", [0, 0.02, 0.15])
def test_files_cannot_grow(megabytes: float, tiny_model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the record, weights, a checkpoint."""
    data = tiny_run.build_data(tmp_path / "data", rows={"train": 32, "validation": 8})
    good = write(tmp_path / "o", {"notes.txt": "mine"})
    given = ["--model", str(tiny_model), "--data", str(data), "--output-dir", str(good)]
    size = int(megabytes * 2**20)
    code = (
        "import resource, sys, rgft.train; from rgft.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1));"
        f"sys.argv = {['rgft', 'train', *given]!r}; main()"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    *notes, line = done.stderr.splitlines()
    assert all(note.startswith("rgft: note: ") for note in notes)
    assert f"cannot write to {good}" in line
    assert (good / "notes.txt").read_text() == "mine"
    assert not list(good.glob(".*"))


def test_a_full_disk_is_no_end(
    stopped: tuple[RunSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays, and the run goes on once there is room."""
    spec, output = stopped

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("rgft.run_trainer.RunTrainer.save_model", full)
        with pytest.raises(InputError, match="No space left"):
            run(spec, output, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("rgft.error_map.ErrorMap.to_parquet", full)
        with pytest.raises(InputError, match="go on with --resume"):
            run(spec, output, resume=True)
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    resumed, straight = run(spec, output, resume=True), run(spec, tmp_path / "straight")
    assert resumed["metrics"] == straight["metrics"]


def _guide(**settings: Any) -> rgft.Guide:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return rgft.Guide(model, optimizer, rgft.Config(**settings))


def _of_another_model() -> None:
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    rgft.Guide(nn.Linear(2, 2), other)


def _another_state() -> None:
    state = _guide().state_dict()
    model = nn.Linear(4, 1)
    rgft.Guide(model, torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(state)


API: dict[str, Callable[[], object]] = {
    "optimizer of another model": _of_another_model,
    "no optimizer": lambda: rgft.Guide(nn.Linear(2, 2), "adam"),  # type: ignore[arg-type]
    "state of another model": _another_state,
    "empty state": lambda: _guide().load_state_dict({}),
    "samples without a probe": lambda: _guide(signal="fisher"),
    "unknown signal": lambda: _guide(signal="x"),
    "unknown policy": lambda: _guide(policy="x"),
    "steps not known": lambda: _guide(policy="gradual-unfreezing"),
    "nothing left to train": lambda: _guide(policy="head-only", always_train=()),
    "empty module": lambda: rgft.partition(nn.Module(), "layer"),
    "module without parameters": lambda: rgft.partition(nn.ReLU(), "parameter"),
    "epochs is text": lambda: RunSpec(task="trec", epochs="3"),  # type: ignore[arg-type]
    "batch size is a fraction": lambda: RunSpec(task="trec", batch_size=1.5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", API)
def test_api(name: str) -> None:
    with pytest.raises(InputError) as refused:
        API[name]()
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", b"garbage" * 9])
def test_error_map_of_garbage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "map.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"map\.parquet"):
        ErrorMap.from_parquet(tmp_path / "map.parquet")


def test_settings_of_the_api_must_fit_a_record() -> None:
    spec = RunSpec(task="trec", settings={"signal": lambda s: s.numel})
    with pytest.raises(InputError, match=r"signal|record"):
        run(spec, Path("never-made"))
    assert not Path("never-made").exists()
