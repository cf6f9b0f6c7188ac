"""The record of a run: where each part of it ran; and those that are committed."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rgft import records

STATUS = Path("/proc/self/status")
RECORDS = Path(__file__).parent.parent / "benchmarks" / "records"
ABSOLUTE = re.compile(r"(?<![\w./<])(/|~/|[A-Z]:[\\/])\w+[/\\.\w-]*")


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ('{"schema": 1, "status": "running"}', True),
        ('{"schema": 9, "status": "finished", "more": []}', True),
        ('{"schema": true, "status": "x"}', False),
        ('{"schema": 1}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_a_record_is_told_from_another_file(text: str, ours: bool, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    assert records.is_run(tmp_path) == ours


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc")
def test_peak_memory_is_what_the_system_says() -> None:
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    resident = int(line.split()[1]) * 1024
    peak = records.peak_memory_bytes()
    assert peak is not None
    assert 0.9 * resident < peak < 100 * resident  # a process that starts another lends it its peak


def test_peak_memory_is_not_known_away_from_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "resource", None)
    assert records.peak_memory_bytes() is None


def test_a_resume_is_added_to_where_the_run_began(monkeypatch: pytest.MonkeyPatch) -> None:
    record: dict[str, Any] = {}
    for step, version in ((0, "1"), (20, "2"), (40, "3")):
        monkeypatch.setattr(records, "versions", lambda version=version: {"torch": version})
        monkeypatch.setattr(records, "code_revision", lambda version=version: f"commit {version}")
        records.note_environment(record, step)
    assert (record["versions"], record["code_revision"]) == ({"torch": "1"}, "commit 1")
    assert [(r["step"], r["versions"]["torch"]) for r in record["resumed"]] == [
        (20, "2"),
        (40, "3"),
    ]
    assert record["resumed"][0]["code_revision"] == "commit 2"
    assert record["resumed"][0]["hardware"] == record["hardware"] == records.hardware()


def texts(value: Any) -> Iterator[str]:
    """Every text in a record, names included."""
    if isinstance(value, dict):
        yield from value
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("path", sorted(RECORDS.iterdir()), ids=lambda path: path.name)
def test_no_committed_record_names_a_place_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    found = [one for line in lines for one in texts(json.loads(line))]
    assert any(one.startswith(("python benchmarks/", "rgft train ")) for one in found)
    assert [one for one in found if ABSOLUTE.search(one)] == []


def test_files_are_left_out_of_how_a_benchmark_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECORDS.parent))
    invocation = importlib.import_module("invocation").invocation
    given = ["--methods", "lora", "full", "--records", "/a b/c", "--steps", "3", "--place=/d", "-v"]
    monkeypatch.setattr("sys.argv", ["/somewhere/llm.py", *given])
    told = invocation("/somewhere/llm.py", "--records", "--place")
    assert told == "python benchmarks/llm.py --methods lora full --steps 3 -v"
