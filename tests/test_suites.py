"""Suites as they are written: what is read, and one line for what is wrong."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from rgft import extensions
from rgft.bench.cells import Cell, cell, check_arms_differ, count, key_of, points, settled
from rgft.bench.journal import FILE, append_record, read_records
from rgft.bench.running import run_suite
from rgft.bench.suite import load_suite
from rgft.bench.workers import Ended
from rgft.cli import app
from rgft.errors import InputError
from rgft.extensions import digests, extend
from rgft.methods import METHODS, Method, find_method
from rgft.spec import RunSpec
from rgft.tasks import TASKS, load_task
from rgft.tasks.folder import digest
from rgft.tasks.splitting import fewer_train_rows

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
HEAD = "tasks: [trec]\nseeds: [0, 1]\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_unseen_rows_are_those_that_no_choice_was_made_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SUITES.parent))
    unseen = importlib.import_module("unseen")
    whole = load_task("reviews").splits
    splits = unseen.load("reviews").splits
    few = fewer_train_rows(load_task("reviews"), 2000).splits["train"]
    assert splits["train"]["text"] == few["text"]
    assert splits["validation"]["text"] == whole["validation"]["text"]
    test = set(splits["test"]["text"])
    assert len(test) > 6000 and test < set(whole["train"]["text"])
    for name in ("train", "validation"):
        assert not test & set(splits[name]["text"])
    assert set(splits) == {"train", "validation", "test"}
    for name, entry in unseen.TASKS.items():
        monkeypatch.setitem(TASKS, name, entry)
    suite = load_suite(SUITES / "unseen.yaml")
    check_arms_differ(suite)
    assert not set(suite.seeds) & set(load_suite(SUITES / "headline.yaml").seeds)


def test_an_edited_method_of_the_users_own_makes_other_cells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text("from rgft import METHODS as M\nMETHODS = {'edited': M['full']}\n")
    monkeypatch.setattr("rgft.extensions.TABLES", {"METHODS": ({}, Method)})
    extend((str(path),))
    monkeypatch.setitem(METHODS, "edited", METHODS["full"])
    (digest,) = digests("edited", "trec")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    specs = [RunSpec(model="minilm", task="trec", method=name) for name in ("edited", "full")]
    before = [key_of(spec, "m", "t") for spec in specs]
    monkeypatch.setitem(extensions._DIGESTS, ("METHODS", "edited"), "as edited")
    after = [key_of(spec, "m", "t") for spec in specs]
    assert before[0] != after[0] and before[1] == after[1]
    assert digests("full", "edited") == []  # a task of that name is another thing


def test_edited_data_of_the_users_own_make_other_cells(tmp_path: Path) -> None:
    def key(folder: Path) -> str:
        suite = load_suite(written(tmp_path, "tasks: [data]\nseeds: [0]\narms: {full: {}}\n"))
        (point,) = points(suite)
        one = cell(suite, point, None, 0)
        return key_of(replace(one.spec, data=str(folder)), "m", "data")

    folders = [tmp_path / name for name in ("data", "same", "row", "split")]
    for folder in folders:
        folder.mkdir()
        (folder / "train.csv").write_text("text,label\na,0\nb,1\n", encoding="utf-8")
    (folders[2] / "train.csv").write_text("text,label\na,0\nb,0\n", encoding="utf-8")
    (folders[3] / "dev.csv").write_text("text,label\na,0\nb,1\n", encoding="utf-8")
    (folders[1] / "notes.txt").write_text("of no matter", encoding="utf-8")
    keys = [key(folder) for folder in folders]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    (folders[3] / "train.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="train"):
        digest(folders[3])


def test_commands_about_suites_are_there_before_what_takes_seconds_to_import() -> None:
    script = "import sys, rgft.bench_commands; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    assert b"'rgft.bench_commands'" in done.stdout
    for module in (b"'transformers'", b"'rgft.survey'", b"'plotly'"):
        assert module not in done.stdout


def test_small_is_what_it_promises() -> None:
    suite = load_suite(SUITES / "small.yaml")
    check_arms_differ(suite)
    assert len(suite.arms) >= 12 and len(suite.seeds) == 3 and len(suite.tasks) == 5
    assert {point.budget for point in points(suite)} == {0.1, 0.3, 1.0}
    for point in points(suite):
        for rate in point.arm.rates:
            spec = cell(suite, point, rate, 0).spec
            assert spec.max_train_rows == (500 if point.task.name == "rte" else 1000)
            assert spec.epochs == 3
    assert count(suite) == sum(len(p.arm.rates) + 2 for p in points(suite))
    surveyed = find_method("rgft").surveyed
    assert surveyed is not None
    recipes = (surveyed.shallow, surveyed.wide, surveyed.deep)
    assert {r.batch_size for r in recipes} == {16} and not any(r.dropout for r in recipes)
    for arm in suite.arms:
        if arm.name not in ("full", "rgft"):
            wanted = {"batch_size": 8 if arm.name == "full-tuned" else 16}
            wanted |= {"group_by_length": True, "dropout": False}
            assert {name: arm.options.get(name) for name in wanted} == wanted, arm.name


def test_extending_takes_over_and_changes(tmp_path: Path) -> None:
    text = "arms:\n  full: {batch_size: 8, settings: {beta: 0.5}, rates: [1e-4]}\n"
    text += "  other: {extends: full, method: rgft, settings: {alpha: 2}}\n"
    arm = load_suite(written(tmp_path, HEAD + text)).arms[1]
    assert arm.options == {
        "batch_size": 8, "method": "rgft", "settings": {"beta": 0.5, "alpha": 2},
    }  # fmt: skip
    assert arm.rates == (1e-4,) and arm.changes == {"method": "rgft", "settings": {"alpha": 2}}


def test_names_that_look_like_numbers_are_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    task = '{name: mine, label_column: "2020", text_columns: ["1", "2"], balance: null}'
    text = f"tasks: [{task}]\nseeds: [0]\narms: {{full: {{}}}}\n"
    options = load_suite(written(tmp_path, text)).tasks[0].options
    assert (options["label_column"], options["text_columns"]) == ("2020", ("1", "2"))
    assert options["balance"] is None  # as it would be without the suite's own


def test_an_arm_runs_on_the_tasks_that_it_names(tmp_path: Path) -> None:
    text = "tasks: [trec, cola]\nseeds: [0, 1]\nrates: [1e-4, 2e-4]\narms:\n  full: {}\n"
    text += (
        "  one: {extends: full, tasks: [cola], balance: 1}\n  two: {extends: one, balance: 0.5}\n"
    )
    suite = load_suite(written(tmp_path, text))
    ran = [(point.task.name, point.arm.name) for point in points(suite)]
    assert ran == [("trec", "full"), ("cola", "full"), ("cola", "one"), ("cola", "two")]
    assert count(suite) == len(ran) * 3
    assert {c.labels["task"] for c in settled(suite, {})[1] if c.labels["arm"] == "one"} == {"cola"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [trec]\nseeds: [0]\n", "has no arms"),
        (HEAD + "arms: {}\n", "arms is empty"),
        (HEAD + "arm: {full: {}}\n", "did you mean 'arms'"),
        (HEAD + "arms:\n  full: {}\n  full: {}\n", "line 5: the key 'full' is there twice"),
        (HEAD + "arms: {full: {}}\nforgetting: true\n", "forgetting is an option of runs; put it"),
        (HEAD + "arms: {ful: {}}\n", "unknown method 'ful' (did you mean 'full'?)"),
        (HEAD + "arms: {full: {batchsize: 8}}\n", "did you mean 'batch_size'"),
        (HEAD + "arms: {full: {batch_size: 0}}\n", "batch_size is 0"),
        (
            HEAD + "arms: {full: {text_columns: 3}}\n",
            "arm full: text_columns is 3; allowed: a list",
        ),
        (HEAD + "arms: {full: {text_columns: [3]}}\n", "text_columns is 3; allowed: a text"),
        (HEAD + "arms: {full: {label_column: [a]}}\n", "arm full: label_column is ['a']"),
        (HEAD + "arms: {full: {precision: 16}}\n", "arm full: precision is 16; allowed: a text"),
        (HEAD + "arms: {full: {settings: {bta: 1}}}\n", "did you mean 'beta'"),
        (HEAD + "arms: {full: {rates: [0]}}\n", "rates has 0"),
        (HEAD + "arms: {full: {budgets: [3]}}\n", "budget is '3'"),
        (HEAD + "arms: {full: {tasks: [trek]}}\n", "unknown task 'trek' (did you mean 'trec'?)"),
        (HEAD + "arms: {full: {tasks: []}}\n", "arm full: tasks is []"),
        (HEAD + "arms: {full: {extends: lora}}\n", "unknown arm to extend 'lora'"),
        (HEAD + "arms: {b: {extends: full}, full: {}}\n", "that stands above it: move it up"),
        (
            HEAD + "arms: {full: {}, suffix: {extends: full, batch_size: 8}}\n",
            "arm suffix extends full, whose method is full; add method: suffix",
        ),
        (HEAD + "arms: {full: {}, b: {method: full}}\n", "full and b are the same runs"),
        ("tasks: [{name: trec, row: 9}]\nseeds: [0]\narms: {full: {}}\n", "task trec: unknown key"),
        ("tasks: [tre]\nseeds: [0]\narms: {full: {}}\n", "did you mean 'trec'"),
        ("tasks: [trec]\nseeds: [a]\narms: {full: {}}\n", "seeds has 'a'"),
        ("tasks: [trec]\nseeds: [0, 0]\narms: {full: {}}\n", "seeds has 0 twice"),
        (HEAD + "sweep: some\narms: {full: {}}\n", "sweep is 'some'"),
        ("- a\n", "holds no mapping"),
        ("a: [\n", "line 2"),
        (HEAD + "arms: {full: !!python/name:os.system {}}\n", "could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        suite = load_suite(written(tmp_path, text))
        check_arms_differ(suite)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_seeds_come_when_all_rates_are_settled(tmp_path: Path) -> None:
    text = HEAD + "rates: [1e-4, 2e-4, 4e-4]\narms: {full: {}}\n"
    suite = load_suite(written(tmp_path, text))
    _, due = settled(suite, {})
    assert [(c.labels["rate"], c.spec.seed) for c in due] == [(1e-4, 0), (2e-4, 0), (4e-4, 0)]
    scores = {1e-4: 0.5, 2e-4: 0.9}
    records = {
        c.key: {**c.labels, "status": "finished", "metric": "accuracy",
                "metrics": {"validation": {"accuracy": scores[c.labels["rate"]]}}}
        for c in due[:2]
    }  # fmt: skip
    assert [c.labels["rate"] for c in settled(suite, records)[1]] == [4e-4]
    records[due[2].key] = {**due[2].labels, "status": "failed"}
    assert [(c.labels["rate"], c.spec.seed) for c in settled(suite, records)[1]] == [(2e-4, 1)]


class TwoAtATime:
    """Both have their records before either is told of, as with processes that end together."""

    slots = 2

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Cell] = []

    def start(self, cell: Cell, *, again: bool) -> None:
        del again
        self._running.append(cell)

    def ended(self, timeout: float) -> list[Ended]:
        del timeout
        for one in self._running:
            finished = {"status": "finished", "metric": "loss", "flops": {"share": 1.0}}
            measured = {"metrics": {"validation": {"loss": 1.0}}, "seconds": {"train": 60.0}}
            record = {"key": one.key, **one.labels, **finished, **measured}
            append_record(self._folder / FILE, record)
        ended, self._running = [Ended(one, "recorded") for one in self._running], []
        return ended

    def stop(self) -> None:
        pass


def test_cells_that_end_together_are_counted_one_by_one(tmp_path: Path) -> None:
    text = "tasks: [trec]\nseeds: [0, 1, 2, 3, 4]\narms: {full: {}}\n"
    said: list[str] = []
    run_suite(load_suite(written(tmp_path, text)), tmp_path, TwoAtATime(tmp_path), say=said.append)
    assert [line.split()[0] for line in said] == [f"[{i}/5]" for i in (1, 2, 3, 4, 5)]
    left = [line.partition("; about ")[2] for line in said]
    assert left == ["2 min 0 s left", "2 min 0 s left", "1 min 0 s left", "1 min 0 s left", ""]


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_torn_line_is_no_record_and_is_mended(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    append_record(path, {"key": "a"})
    with path.open("a", encoding="utf-8") as file:
        file.write((json.dumps({"key": "b", "long": "x" * 9000}) + "\n")[:cut])
    assert read_records(path) == [{"key": "a"}]
    append_record(path, {"key": "c"})
    assert read_records(path) == [{"key": "a"}, {"key": "c"}]
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"line 1 is no JSON .*remove the line"):
        read_records(path)
    for text in ("text,label\n", "[1]\n"):
        (tmp_path / "train.csv").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"line 1 is no JSON.*give a file of records"):
            read_records(tmp_path / "train.csv")


def test_a_folder_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; give the YAML file of a suite"):
        load_suite(tmp_path)


def test_a_folder_of_data_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_DATA", "/no/such")
    with pytest.raises(InputError, match="RGFT_DATA names /no/such, which is no folder"):
        TASKS["cola"].available()


def test_what_a_run_would_fetch_is_said_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = written(tmp_path, HEAD + "models: [minilm]\narms: {full: {}}\n")
    given = ["bench", str(suite), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    monkeypatch.setitem(TASKS, "trec", replace(TASKS["trec"], available=lambda: False))
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 0 and not (tmp_path / "out").exists()
    assert "to be fetched by the first run: trec (" in said.stderr


def test_what_train_refuses_is_said_in_the_words_of_a_suite(tmp_path: Path) -> None:
    text = "tasks: [trec]\nseeds: [0]\narms: {full: {group_by_length: true}}\nbudgets: [0.5, 1]\n"
    suite = load_suite(written(tmp_path, text.replace("true", "false")))
    with pytest.raises(InputError, match=r"give budgets,? ") as caught:
        [cell(suite, point, 1e-4, 0) for point in points(suite)]
    assert "--" not in str(caught.value)
