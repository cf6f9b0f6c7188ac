"""Tasks: the user's folders, bad input of every kind, the hub's schema, and the rated reviews."""

import csv
import dataclasses
import hashlib
import html
import io
import json
import logging
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hub_rows
from rgft.errors import InputError
from rgft.metrics import METRICS
from rgft.tasks import HUB_TASKS, TASKS, TaskData, fashion, load_folder, load_task, reviews
from rgft.tasks.archive import read_members
from rgft.tasks.hub import HubTask, load_hub_task
from rgft.tasks.splitting import carve_validation, fewer_train_rows
from rgft.tasks.tables import SUFFIXES

Rows = Sequence[Mapping[str, object]]
WORDS = ["fine", "dull", "bright", "slow", "warm", "cold", "sharp", "flat", "rich", "thin"]
ROWS: Rows = [
    {"id": f"r{i}", "text": f"a {WORDS[i % 10]} film, no {i}", "label": i % 2} for i in range(40)
]
PAIRS: Rows = [
    {"premise": f"it is {i}", "hypothesis": f'not {i}, "é"\nnor more', "label": f"c{i % 3}"}
    for i in range(30)
]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(list(rows)).to_csv(path, index=False)
    else:
        pd.DataFrame(list(rows)).to_parquet(path)
    return path


def columns(split: datasets.Dataset) -> dict[str, list[object]]:
    return {name: list(split[name]) for name in split.column_names}


def refused(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` must raise."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# the user's folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder_loads_alike_from_every_format(tmp_path: Path, suffix: str) -> None:
    for name, rows in (("train", ROWS[:30]), ("validation", ROWS[30:36]), ("test", ROWS[36:])):
        write(tmp_path / f"{name}{suffix}", rows)
    task = load_folder(tmp_path)
    assert (task.kind, task.metric, task.num_labels) == ("classification", "accuracy", 2)
    assert (task.input_columns, task.label_column) == (("text",), "label")
    assert task.label_names == ("0", "1")
    assert list(task.splits) == ["train", "validation", "test"]
    for name, rows in (("train", ROWS[:30]), ("validation", ROWS[30:36]), ("test", ROWS[36:])):
        expected = {key: [row[key] for row in rows] for key in ("text", "label")}
        assert columns(task.splits[name]) == expected
    assert task.splits["train"].cache_files == []  # in memory: nothing is left behind


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pairs_and_string_labels(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", PAIRS)
    write(tmp_path / f"dev{suffix}", PAIRS[:7])
    task = load_folder(tmp_path)
    assert task.input_columns == ("premise", "hypothesis")
    assert task.label_names == ("c0", "c1", "c2")
    assert columns(task.splits["validation"]) == {
        "premise": [row["premise"] for row in PAIRS[:7]],
        "hypothesis": [row["hypothesis"] for row in PAIRS[:7]],
        "label": [0, 1, 2, 0, 1, 2, 0],
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float_labels_mean_regression(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"text {i}", "score": i / 4 - 3} for i in range(40)]
    write(tmp_path / f"train{suffix}", rows)
    task = load_folder(tmp_path)
    assert (task.kind, task.metric, task.num_labels) == ("regression", "pearson", 1)
    assert task.label_names == ()
    everything = [*task.splits["train"]["score"], *task.splits["validation"]["score"]]
    assert sorted(everything) == [row["score"] for row in rows]
    assert all(isinstance(value, float) for value in everything)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ints_are_renumbered_and_keep_their_names(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"text {i}", "stars": (10, -1, 2)[i % 3]} for i in range(30)]
    write(tmp_path / f"train{suffix}", rows)
    write(tmp_path / f"test{suffix}", rows[:3])
    task = load_folder(tmp_path)
    assert task.label_names == ("-1", "2", "10")
    assert list(task.splits["test"]["stars"]) == [2, 0, 1]


def test_booleans_are_classes_across_formats(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 2 == 0} for i in range(20)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.csv", rows[:3])
    task = load_folder(tmp_path)
    assert task.label_names == ("False", "True")
    assert list(task.splits["validation"]["label"]) == [1, 0, 1]


def test_csv_texts_stay_as_written(tmp_path: Path) -> None:
    texts = ["NA", "null", "None", "nan", "007", "1.50", "  padded", 'with "quotes", and\nlines']
    rows = [{"text": text, "label": "NA" if i % 2 else "yes"} for i, text in enumerate(texts)]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "validation.csv", rows)
    task = load_folder(tmp_path)
    assert list(task.splits["train"]["text"]) == texts
    assert task.label_names == ("NA", "yes")


def test_space_around_csv_headers_and_labels_is_no_part_of_them(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text, label\nfine , pos\n bad,neg\nok,pos \n")
    (tmp_path / "dev.csv").write_text("text,label\nfine,neg\n")
    task = load_folder(tmp_path)
    assert task.label_names == ("neg", "pos")
    assert columns(task.splits["train"]) == {"text": ["fine ", " bad", "ok"], "label": [1, 0, 1]}


def test_json_lines_may_hold_any_separator_inside_a_text(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive"
    lines = [json.dumps({"text": f"{text}{i}", "label": i}, ensure_ascii=False) for i in (0, 1)]
    (tmp_path / "train.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    write(tmp_path / "validation.jsonl", [{"text": "x", "label": 1}])
    assert list(load_folder(tmp_path).splits["train"]["text"]) == [text + "0", text + "1"]


def test_a_long_csv_field_is_no_error(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [{"text": f"{i} " + "long " * 60_000, "label": i} for i in (0, 1)]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "validation.csv", rows)
    assert len(load_folder(tmp_path).splits["train"]["text"][0]) == 300_002
    assert csv.field_size_limit() == limit


def test_validation_is_carved_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with caplog.at_level(logging.INFO, logger="rgft"):
        task = load_folder(tmp_path)
    assert "no validation split: 4 of its 40 training rows" in caplog.text
    train, validation = (set(task.splits[name]["text"]) for name in ("train", "validation"))
    assert len(validation) == 4 and not train & validation
    assert train | validation == {row["text"] for row in ROWS}
    assert Counter(task.splits["validation"]["label"]) == {0: 2, 1: 2}


def test_carving_does_not_depend_on_the_order(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    write(tmp_path / "a" / "train.jsonl", ROWS)
    write(tmp_path / "b" / "train.jsonl", shuffled)
    one, two = (
        set(load_folder(tmp_path / name).splits["validation"]["text"]) for name in ("a", "b")
    )
    assert one == two


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(0, 2)), min_size=1, max_size=60))
def test_carving_keeps_texts_together_and_classes_alive(rows: list[tuple[str, int]]) -> None:
    texts, strata = [(text,) for text, _ in rows], [stratum for _, stratum in rows]
    taken = carve_validation(texts, strata)
    sides: dict[tuple[str, ...], set[bool]] = {}
    for text, side in zip(texts, taken, strict=True):
        sides.setdefault(text, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    owner = {
        text: min(s for (t,), s in zip(texts, strata, strict=True) if t == text[0])
        for text in sides
    }
    for stratum in set(owner.values()):
        assert {False} in [sides[text] for text in owner if owner[text] == stratum]
    if max(Counter(owner.values()).values()) > 1:
        assert (
            1
            <= len({t for t, side in zip(texts, taken, strict=True) if side})
            <= max(1, round(0.1 * len(sides)))
        )
    else:
        assert not any(taken)


def test_fewer_training_rows_do_not_depend_on_the_order(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    kept = []
    for name, rows in (("a", ROWS), ("b", shuffled)):
        write(tmp_path / name / "train.jsonl", rows)
        whole = load_folder(tmp_path / name)
        fewer = fewer_train_rows(whole, 7)
        assert columns(fewer.splits["validation"]) == columns(whole.splits["validation"])
        assert set(fewer.splits["train"]["text"]) <= set(whole.splits["train"]["text"])
        kept.append(sorted(fewer.splits["train"]["text"]))
    assert kept[0] == kept[1] and len(kept[0]) == 7


def test_columns_that_restate_the_label_are_no_text(tmp_path: Path) -> None:
    rows = [{**row, "label_name": ("bad", "good")[i % 2]} for i, row in enumerate(ROWS)]
    write(tmp_path / "train.jsonl", rows)
    assert load_folder(tmp_path).input_columns == ("text",)


def test_well_known_pair_is_found_among_others(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{**row, "genre": f"g{i % 7}"} for i, row in enumerate(PAIRS)])
    assert load_folder(tmp_path).input_columns == ("premise", "hypothesis")


def test_named_columns_are_used(tmp_path: Path) -> None:
    rows = [{"a": f"x {i}", "b": f"y {i}", "label": i % 2, "grade": i / 2} for i in range(20)]
    write(tmp_path / "train.csv", rows)
    task = load_folder(tmp_path, text_columns=["b"], label_column="grade")
    assert (task.input_columns, task.label_column, task.kind) == (("b",), "grade", "regression")


# the user's folder, wrong


def test_folder_errors(tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: load_folder(tmp_path / "nowhere"))
    write(tmp_path / "training.jsonl", ROWS)
    message = refused(lambda: load_folder(tmp_path))
    assert "no training file" in message and "training.jsonl" in message
    assert "is a file" in refused(lambda: load_folder(tmp_path / "training.jsonl"))


def test_two_training_files(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.jsonl", ROWS)
    assert "train.csv, train.jsonl" in refused(lambda: load_folder(tmp_path))


def test_two_validation_files_under_different_names(tmp_path: Path) -> None:
    for name in ("train", "dev", "validation"):
        write(tmp_path / f"{name}.csv", ROWS)
    assert "dev.csv, validation.csv" in refused(lambda: load_folder(tmp_path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_split(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", ROWS)
    empty = tmp_path / f"validation{suffix}"
    if suffix == ".parquet":
        pd.DataFrame({"text": [], "label": []}).to_parquet(empty)
    else:
        empty.write_text({".csv": "text,label\n", ".json": "[]"}.get(suffix, ""))
    message = refused(lambda: load_folder(tmp_path))
    assert str(empty) in message and "no rows" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "lab', "line 2 is not valid"),
        ("train.jsonl", b'{"text": "a", "label": 0}\n\n[1, 2]\n', "line 3 is a list"),
        ("train.jsonl", b"[" * 200_000, "line 1 is not valid JSON"),
        ("train.json", b'[{"text": "a", "label": 0}, 3]', "row 2 is a int"),
        ("train.json", b'[{"text": "a", "label": 0},', "not valid JSON"),
        ("train.csv", b"text,label\na,0\nb,c,1\n", "row 2 has 3 fields but the header has 2"),
        ("train.csv", b"text,label\na,0\nb\n", "row 2 has 1 fields but the header has 2"),
        ("train.csv", b'text,label\n"a,0\nb,1\n', "not valid CSV"),
        ("train.csv", b"text,text\na,b\n", "more than one column 'text'"),
        ("train.csv", b"text;label\na;0\n", "separate columns with commas"),
        ("train.csv", "text,label\ncafé,0\n".encode("latin-1"), "not UTF-8 (byte 0xe9"),
        ("train.jsonl", '{"text": "a"}'.encode("utf-16"), "not UTF-8 (byte 0xff"),
        ("train.parquet", b"PAR1 and nothing more", "not a readable Parquet file"),
        ("train.parquet", b"", "not a readable Parquet file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(lambda: load_folder(tmp_path))
    assert expected in message and name in message


def test_parquet_cut_short_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", ROWS)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        assert "not a readable Parquet file" in refused(lambda: load_folder(tmp_path))


def test_a_damaged_parquet_page_is_refused_or_read(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", ROWS)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(4, len(whole) - 8)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            load_folder(tmp_path)
        except InputError as problem:
            assert "\n" not in str(problem)


def with_change(at: int, **change: object) -> Rows:
    return [*ROWS[:at], {**ROWS[at], **change}, *ROWS[at + 1 :]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (with_change(4, label=None), "1 of 40 rows have no label in column 'label', the first is"),
        (
            with_change(4, text=None),
            "1 of 40 rows have no text in column 'text', the first is row 5",
        ),
        (with_change(4, text="  "), "have no text"),
        (with_change(4, text="\ud800"), "not valid Unicode"),
        (with_change(4, label="one"), "of type int and str"),
        (with_change(4, label=[1]), "of type int and list"),
        (
            with_change(4, label=float("nan")),
            "label nan in row 5 of column 'label' is not a finite",
        ),
        (with_change(4, label=1e999), "label inf in row 5"),
        ([{**row, "label": True} for row in ROWS], "every label in column 'label' is True"),
        ([{**row, "label": 0.5} for row in ROWS], "every label in column 'label' is 0.5"),
        ([{**row, "label": f"c{i}"} for i, row in enumerate(ROWS)], "40 different labels"),
        ([{"text": row["text"], "kind": 1} for row in ROWS], "--label-column"),
        ([{**row, "score": 0.5} for row in ROWS], "['label', 'score'] could each be the label"),
        ([{**row, "title": f"t{i}"} for i, row in enumerate(ROWS)], "['text', 'title'] could each"),
        ([{"label": row["label"], "n": 1} for row in ROWS], "no column of texts"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: Rows, expected: str) -> None:
    write(tmp_path / "train.jsonl", rows)
    assert expected in refused(lambda: load_folder(tmp_path))


def test_text_that_is_no_string(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", with_change(2, text=7))
    message = refused(lambda: load_folder(tmp_path, text_columns=["text"]))
    assert "1 of 40 rows are not strings in column 'text', the first is row 3" in message


@pytest.mark.parametrize("written", ["nan", "inf", "-Infinity"])
def test_csv_regression_label_must_be_finite(tmp_path: Path, written: str) -> None:
    rows = [{"text": f"t{i}", "score": f"{i}.5"} for i in range(20)]
    write(tmp_path / "train.csv", [*rows, {"text": "bad", "score": written}])
    assert f"label {written!r} in row 21" in refused(lambda: load_folder(tmp_path))


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_unseen_label(tmp_path: Path, split: str, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", ROWS)
    write(tmp_path / f"{split}{suffix}", [{"text": "x", "label": 0}, {"text": "y", "label": 7}])
    message = refused(lambda: load_folder(tmp_path))
    assert split in message and "7" in message and "does not occur in training" in message


def test_true_is_not_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "validation.jsonl", [{"text": "x", "label": True}])
    assert "label True in row 1" in refused(lambda: load_folder(tmp_path))


def test_missing_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    assert "no column 'body'" in refused(lambda: load_folder(tmp_path, text_columns=["body"]))
    assert "no column 'kind'" in refused(lambda: load_folder(tmp_path, label_column="kind"))
    for wrong in ([], ["text", "text"], ["text", "id", "label"], ["label"]):
        said = "give one, or two" if wrong != ["label"] else "'label' is the label column"
        assert said in refused(lambda w=wrong: load_folder(tmp_path, text_columns=w))
    write(tmp_path / "test.jsonl", [{"text": "x"}])
    assert "test.jsonl has no column 'label'" in refused(lambda: load_folder(tmp_path))


def test_too_small_to_carve(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    assert "give a validation file" in refused(lambda: load_folder(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS).chmod(0)
    assert "cannot be read" in refused(lambda: load_folder(tmp_path))


@given(content=st.binary(max_size=200), suffix=st.sampled_from(SUFFIXES))
def test_arbitrary_bytes_give_data_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / f"train{suffix}").write_bytes(content)
    try:
        load_folder(folder)
    except InputError as problem:
        assert "\n" not in str(problem)


# fingerprints


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: Rows) -> str:
        write(tmp_path / name / "train.jsonl", rows)
        write(tmp_path / name / "validation.jsonl", ROWS[:4])
        return load_folder(tmp_path / name).fingerprint()

    base = fingerprint("a", ROWS)
    assert fingerprint("b", ROWS) == base
    changed = [
        with_change(3, text="other"),
        with_change(3, label=0),
        ROWS[:-1],
        [*ROWS[1:], ROWS[0]],
    ]
    assert len({base, *(fingerprint(f"c{i}", rows) for i, rows in enumerate(changed))}) == 5


# tasks by name


def test_unknown_task_lists_the_allowed() -> None:
    message = refused(lambda: load_task("mnist"))
    assert "'mnist'" in message and all(name in message for name in TASKS)


def test_what_is_here_is_said_of_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGFT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RGFT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "installed")
    write(tmp_path / "data" / "trec" / "train.jsonl", ROWS)
    assert [name for name, task in TASKS.items() if task.available()] == ["trec"]
    for task in TASKS.values():
        assert task.metric in METRICS[task.kind]
        assert "\n" not in task.description


def from_hub(task: str, count: int, *, labelled: bool = True) -> Rows:
    return list(hub_rows.rows(task, count, labelled=labelled).to_list())


TEXT_TASKS = [t for t in HUB_TASKS if t.modality == "text" and t.kind != "generation"]


@pytest.mark.parametrize("task", TEXT_TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_hub_task_from_a_folder(tmp_path: Path, task: HubTask, suffix: str) -> None:
    name = task.name
    write(tmp_path / f"train{suffix}", from_hub(name, 60))
    write(tmp_path / f"test{suffix}", from_hub(name, 5, labelled=False))
    loaded = load_task(name, tmp_path)
    assert set(loaded.splits) == {"train", "validation"}  # the test labels are hidden
    assert (len(loaded.splits["train"]), len(loaded.splits["validation"])) == (54, 6)
    assert set(loaded.splits["train"].column_names) == {*loaded.input_columns, loaded.label_column}
    labels = set(loaded.splits["train"][loaded.label_column])
    if loaded.kind == "classification":
        assert labels == set(range(loaded.num_labels))
    else:
        assert len(labels) == 54 and all(isinstance(label, float) for label in labels)
    assert loaded.metric == TASKS[name].metric


@pytest.mark.parametrize("name", [name for name in hub_rows.SCHEMAS if name != "wikitext"])
def test_hub_task_as_the_hub_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    counts = {"train": 200, "validation": 20}
    monkeypatch.setenv("RGFT_DATA", str(tmp_path))
    if name == "metamathqa":
        hub_rows.write("gsm8k", tmp_path / "gsm8k", counts)
    loaded = load_task(name, hub_rows.write(name, tmp_path / "data", counts))
    schema = hub_rows.SCHEMAS[name][loaded.label_column]
    if loaded.kind == "classification":
        assert loaded.num_labels == schema.num_classes
        assert set(loaded.splits["train"][loaded.label_column]) == set(range(loaded.num_labels))
        if None not in (schema.names, *schema.names) and schema.names[0] != "0":
            assert loaded.label_names == tuple(schema.names)
    kept = {"mnli": {"mismatched"}}.get(name, set())
    if name in (*hub_rows.LABELLED_TESTS, "metamathqa"):
        kept = {"test"}
    assert set(loaded.splits) == {"train", "validation"} | kept
    assert loaded.modality == TASKS[name].modality


def test_texts_to_write_are_whole_and_have_references(tmp_path: Path) -> None:
    rows = [
        {"source": ["One.", "Two."], "target": ["a", "b"]},
        {"source": ["Three."], "target": ["c"]},
    ]
    blank = {"source": [], "target": ["d"]}
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [*rows, blank])
    loaded = load_task("scitldr", tmp_path)
    assert loaded.splits["train"].to_list() == [
        {"source": "One. Two.", "target": ["a", "b"]}, {"source": "Three.", "target": ["c"]},
    ]  # fmt: skip
    changed = dataclasses.replace(loaded, prompt="{source}")
    assert changed.fingerprint() != loaded.fingerprint()


def test_metamathqa_is_judged_on_gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_DATA", str(tmp_path))
    questions = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(600)]
    write(tmp_path / "gsm8k" / "main" / "train.jsonl", questions)
    write(tmp_path / "gsm8k" / "main" / "test.jsonl", questions[:70])
    long = {"query": "q" * 1297, "response": "r"}
    rows = [{"query": "q", "response": "r", "type": "GSM_SV"}, long, {**long, "response": "rrr"}]
    write(tmp_path / "metamathqa" / "train.jsonl", rows)
    loaded = load_task("metamathqa")
    sizes = {name: len(split) for name, split in loaded.splits.items()}
    assert sizes == {"train": 2, "validation": 50, "test": 70}
    assert loaded.splits["test"][3] == {"query": "3?", "response": ["#### 3"]}
    assert set(loaded.splits["validation"]["query"]) <= {row["question"] for row in questions}


def test_wic_and_multirc_are_pairs_made_of_their_columns(tmp_path: Path) -> None:
    row = {"word": "bed", "sentence1": "a {bed}", "sentence2": "bed 2", "label": 1}
    write(tmp_path / "wic" / "train.jsonl", [row, {**row, "sentence1": "b", "label": 0}] * 5)
    write(tmp_path / "wic" / "validation.jsonl", [row])
    assert load_task("wic", tmp_path / "wic").splits["train"][0] == {
        "first": "bed: a {bed}", "second": "bed 2", "label": 1,
    }  # fmt: skip
    row = {"paragraph": "p", "question": "q?", "answer": "yes", "label": 1}
    write(tmp_path / "m" / "train.jsonl", [row, {**row, "answer": "no", "label": 0}])
    write(tmp_path / "m" / "validation.jsonl", [row])
    assert load_task("multirc", tmp_path / "m").splits["train"][1] == {
        "asked": "q? no", "paragraph": "p", "label": 0,
    }  # fmt: skip


def test_hub_task_refuses_labels_outside_its_schema(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*from_hub("rte", 4), {**from_hub("rte", 1)[0], "label": 2}])
    message = refused(lambda: load_task("rte", tmp_path))
    assert "label 2 in row 5" in message and "entailment, not_entailment" in message


def test_hub_task_under_the_data_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_DATA", str(tmp_path))
    write(tmp_path / "glue" / "cola" / "train.jsonl", from_hub("cola", 20))
    assert len(load_task("cola").splits["train"]) == 18


def test_hub_task_through_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RGFT_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, rows in (
        ("train", from_hub("sst2", 20)),
        ("validation", from_hub("sst2", 6)),
        ("test", from_hub("sst2", 6, labelled=False)),
    ):
        write(tmp_path / "repository" / f"{split}.parquet", rows)
    task = next(task for task in HUB_TASKS if task.name == "sst2")
    local = dataclasses.replace(task, path=str(tmp_path / "repository"), config=None)
    loaded = load_hub_task(local)
    assert {name: len(rows) for name, rows in loaded.splits.items()} == {
        "train": 20,
        "validation": 6,
    }


def test_hub_task_from_tables_that_the_hub_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configurations are folders there, and splits folders in them."""
    monkeypatch.delenv("RGFT_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("boolq", "cb"):
        for split, count in {"train": 20, "validation": 6}.items():
            write(tmp_path / "repository" / name / split / "0000.parquet", from_hub(name, count))
    task = next(task for task in HUB_TASKS if task.name == "cb")
    local = dataclasses.replace(task, path=str(tmp_path / "repository"), revision=None)
    loaded = load_hub_task(local)
    assert {name: len(rows) for name, rows in loaded.splits.items()} == {
        "train": 20,
        "validation": 6,
    }
    assert loaded.input_columns == ("premise", "hypothesis")
    (tmp_path / "cache" / "repository").rename(tmp_path / "cache" / "aps___super_glue")
    assert [name for name in ("boolq", "cb", "wic") if TASKS[name].available()] == ["cb"]


def test_hub_task_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RGFT_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(lambda: load_task("trec"))
    assert "cannot be fetched" in message and "$RGFT_DATA/trec" in message


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sst2", {"train": 6920, "validation": 872, "test": 1821}),
        ("cola", {"train": 7250, "validation": 1301, "test": 1043}),
        ("rte", {"train": 2490, "validation": 277}),
        ("trec", {"train": 4904, "validation": 548, "test": 500}),
        ("scitldr", {"train": 1992, "validation": 619, "test": 618}),
        ("gsm8k", {"train": 6726, "validation": 747, "test": 1319}),
    ],
)
def test_hub_tasks_as_published(name: str, sizes: dict[str, int]) -> None:
    if not os.environ.get("RGFT_DATA"):
        pytest.skip("RGFT_DATA does not name a folder with the GLUE and TREC data")
    loaded = load_task(name)
    assert {split: len(rows) for split, rows in loaded.splits.items()} == sizes
    if loaded.kind == "generation":
        return
    assert set(loaded.splits["train"][loaded.label_column]) == set(range(loaded.num_labels))


# the rated reviews


def tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def rated(texts: Sequence[str], first: float = -2.0) -> bytes:
    lines = [f"{i}\t{first + i * 0.1:.4f}\t{text}" for i, text in enumerate(texts)]
    return "\r\n".join(lines).encode()


MOVIES = [f"film {i} &amp; more" for i in range(40)]
FILES = {
    "movieReview": rated([*MOVIES, "film 3 & more"]),
    "amazonReview": rated(["a phone", "film 5 & more", "a case"])
    + b"\r\nx\tno number\ttext\r\nx\t1",
    "nytEditorial": rated(["it rained", "it rained", " it snowed "]),
    "tweet": rated(["lol &lt;3 &amp;#38; &amp;amp;", "so é"], first=0.45),
}


def small_archive(files: Mapping[str, bytes] = FILES) -> bytes:
    names = {"tweet": "tweets"}
    inner = tar(
        {
            f"hutto_ICWSM_2014/{names.get(key, key + 'Snippets')}_GroundTruth.txt": content
            for key, content in files.items()
        }
    )
    root = "vaderSentiment-3.3.2"
    return tar(
        {
            f"{root}/PKG-INFO": b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n",
            f"{root}/setup.py": (
                b"import os, pathlib, setuptools\n"
                b"pathlib.Path(os.environ['RGFT_HOME'] + '.ran').touch()\n"
                b"setuptools.setup(name='vaderSentiment', version='3.3.2')\n"
            ),
            f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz": inner,
        }
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("RGFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def archived(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a small archive; returns its folder."""
    content = small_archive()
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(content).hexdigest())
    folder = home / "reviews"
    folder.mkdir(parents=True)
    (folder / reviews.ARCHIVE).write_bytes(content)
    return folder


def test_reviews_are_parsed_counted_and_split() -> None:
    parsed = reviews.parse_archive(small_archive())
    assert parsed.counts == {
        "movie": {"rows": 41, "malformed": 0, "duplicates": 1},
        "amazon": {"rows": 5, "malformed": 2, "duplicates": 1},
        "newspaper": {"rows": 3, "malformed": 0, "duplicates": 1},
        "tweets": {"rows": 2, "malformed": 0, "duplicates": 0},
    }
    films = [row["text"] for name in ("train", "validation", "test") for row in parsed.splits[name]]
    assert sorted(films) == sorted(f"film {i} & more" for i in range(40))
    assert len(parsed.splits["train"]) > 20
    assert parsed.splits["amazon"] == [
        {"text": "a phone", "rating": -2.0},
        {"text": "a case", "rating": -1.8},
    ]
    assert [row["text"] for row in parsed.splits["newspaper"]] == ["it rained", "it snowed"]
    assert [row["text"] for row in parsed.splits["tweets"]] == ["lol <3 & &", "so é"]


def test_reviews_split_does_not_depend_on_the_order() -> None:
    shuffled = small_archive({**FILES, "movieReview": rated(MOVIES[::-1])})
    one, two = reviews.parse_archive(small_archive()), reviews.parse_archive(shuffled)
    for name in ("train", "validation", "test"):
        assert {row["text"] for row in one.splits[name]} == {
            row["text"] for row in two.splits[name]
        }


def test_reviews_tasks_from_the_same_rows(archived: Path) -> None:
    sentiment, rating = load_task("reviews"), load_task("reviews-rating")
    assert (sentiment.kind, sentiment.label_names) == ("classification", ("negative", "positive"))
    assert (rating.kind, rating.metric, rating.label_column) == ("regression", "pearson", "rating")
    for name, rows in rating.splits.items():
        kept = {
            text: int(value > 0)
            for text, value in zip(rows["text"], rows["rating"], strict=True)
            if abs(value) >= 0.5
        }
        split = sentiment.splits[name]
        assert dict(zip(split["text"], split["label"], strict=True)) == kept
    assert list(sentiment.splits["tweets"]["text"]) == ["so é"]
    assert {path.name for path in archived.iterdir()} == {
        reviews.ARCHIVE,
        "manifest.json",
        *(f"{name}.jsonl" for name in rating.splits),
    }


def test_reviews_come_from_the_cache_without_the_archive(archived: Path) -> None:
    before = load_task("reviews").fingerprint()
    (archived / reviews.ARCHIVE).unlink()
    assert load_task("reviews").fingerprint() == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.jsonl", lambda content: content.replace(b"film", b"Film", 1)),
        ("train.jsonl", lambda content: content[:-20]),
        ("tweets.jsonl", lambda content: b""),
        ("manifest.json", lambda content: content[: len(content) // 2]),
        ("manifest.json", lambda content: b"[]"),
        ("manifest.json", lambda content: content.replace(b"tweets.jsonl", b"x")),
    ],
)
def test_damaged_cache_is_rebuilt_or_refused(
    archived: Path,
    name: str,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = load_task("reviews").fingerprint()
    whole = (archived / name).read_bytes()
    (archived / name).write_bytes(damage(whole))
    assert load_task("reviews").fingerprint() == before
    assert "damaged" in caplog.text
    assert (archived / name).read_bytes() == whole
    (archived / name).write_bytes(damage(whole))
    (archived / reviews.ARCHIVE).write_bytes(b"damaged too")
    assert "pip could not fetch" in refused(lambda: load_task("reviews"))


def test_reviews_offline(home: Path) -> None:
    message = refused(lambda: load_task("reviews"))
    assert "pip could not fetch vaderSentiment-3.3.2.tar.gz" in message and "go online" in message
    assert not home.exists()


def test_reviews_from_a_folder_that_holds_the_archive(archived: Path, tmp_path: Path) -> None:
    assert len(load_task("reviews-rating", archived).splits["tweets"]) == 2
    assert "does not hold vaderSentiment" in refused(lambda: load_task("reviews", tmp_path))
    (archived / reviews.ARCHIVE).write_bytes(small_archive()[:-1])
    assert "damaged or another file" in refused(lambda: load_task("reviews", archived))


def test_pip_fetches_what_has_the_hash(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = small_archive()
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / reviews.ARCHIVE).write_bytes(content)
    assert len(load_task("reviews-rating").splits["tweets"]) == 2
    assert (home / "reviews" / reviews.ARCHIVE).read_bytes() == content


def test_another_archive_is_refused_before_anything_in_it_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / reviews.ARCHIVE).write_bytes(small_archive())
    assert "pip could not fetch" in refused(lambda: load_task("reviews"))
    assert not home.exists()
    assert not Path(f"{home}.ran").exists()


def test_unwritable_cache(archived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(archived))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RGFT_HOME", str(tmp_path / "file"))
    assert "set RGFT_HOME" in refused(lambda: load_task("reviews"))


def test_only_regular_members_of_the_expected_size_are_read() -> None:
    assert read_members(tar({"a": b"xy", "b": b"z"}), {"a": 2}, "x") == {"a": b"xy"}
    assert "not the file expected" in refused(
        lambda: read_members(tar({"a": b"xyz"}), {"a": 2}, "x")
    )
    assert "no member b" in refused(lambda: read_members(tar({"a": b""}), {"b": 2}, "x"))
    assert "not a readable" in refused(lambda: read_members(b"no archive", {"a": 2}, "x"))
    assert "not a readable" in refused(
        lambda: read_members(tar({"a": b"x" * 999})[:40], {"a": 999}, "x")
    )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("a")
        link.type, link.linkname = tarfile.SYMTYPE, "../elsewhere"
        archive.addfile(link)
    assert "not the file expected" in refused(
        lambda: read_members(buffer.getvalue(), {"a": 9}, "x")
    )


def test_reviews_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGFT_HOME", str(tmp_path))
    try:
        rating: TaskData = load_task("reviews-rating")
    except InputError as problem:
        if "pip could not fetch" not in str(problem):
            raise
        pytest.skip(f"the archive cannot be fetched: {problem}")
    sentiment = load_task("reviews")
    assert {name: len(rows) for name, rows in rating.splits.items()} == {
        "train": 8497,
        "validation": 1039,
        "test": 1067,
        "amazon": 3697,
        "newspaper": 5118,
        "tweets": 4200,
    }
    assert {name: len(rows) for name, rows in sentiment.splits.items()} == {
        "train": 8069,
        "validation": 981,
        "test": 1020,
        "amazon": 2977,
        "newspaper": 2930,
        "tweets": 3432,
    }
    manifest = json.loads((tmp_path / "reviews" / "manifest.json").read_text())
    assert sum(count["malformed"] for count in manifest["counts"].values()) == 0
    assert sum(count["duplicates"] for count in manifest["counts"].values()) == 85
    texts = [text for rows in rating.splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts))
    assert not any(html.unescape(text) != text for text in texts)
