"""Numbers in sentences: what records say, and a refusal where they deny a sentence."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_bench_page import ROOT, record


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with records of its own: x is .1, .2 above full on t, .3, .5 below on u."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("words")
    scores = {"t": ((0.7, 0.9), (0.6, 0.7)), "u": ((0.3, 0.2), (0.6, 0.7))}
    lines = []
    for task, (ours, theirs) in scores.items():
        for seed in (0, 1):
            for arm, score, budget, seconds in (("x", ours, 0.3, 1), ("full", theirs, 1.0, 4)):
                value = {"accuracy": score[seed], "perplexity": 10 * score[seed]}
                changed: dict[str, Any] = {"budget": budget, "seconds": {"train": seconds}}
                if task == "t":
                    metrics = {"validation": {"accuracy": 0.5, "loss": 1.0}, "test": value}
                else:
                    metrics = {"validation": {**value, "loss": 1.0}}
                flops = {"spent": 10 * budget, "full": 10.0, "share": budget}
                lines.append(
                    record(arm, seed, 0, task=task, metrics=metrics, flops=flops, **changed)
                )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "own.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    module._results.cache_clear()
    return module


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ("x@0.3; t; test; mean", "80.0"),
        ("x@0.3; t; test; sd", f"80.0 ± {100 * statistics.stdev([0.7, 0.9]):.1f}"),
        ("x@0.3; t u; own; each", "80.0 and 25.0"),
        ("x@0.3 - full@1; t; test; mean", "+15.0"),
        ("x@0.3 - full@1; t; test; above mean", "15.0"),
        ("x@0.3 - full@1; u; validation; below mean", "40.0"),
        ("x@0.3 - full@1; t; test; interval", "+10.0 to +20.0"),
        ("x@0.3 - full@1; t; validation; tie mean", "+0.0"),
        ("x@0.3 - full@1; all; own; range", "-40.0 to +15.0"),
        ("x@0.3 - full@1; t t; own; above range", "15.0"),
        ("x@0.3 - full@1; all; own; mean", "-12.5"),
        ("x@0.3 / full@1; all; own; range", "0.25"),
        ("flops of x; t; test; mean", "0.30"),
        ("seconds of x; t; test; mean", "0.25"),
        ("perplexity of x@0.3; t; own; mean", "8.0"),
        ("x@0.3 - full@1; t; test; above each", "15.0"),
    ],
)
def test_a_number_is_what_the_records_say(words: ModuleType, asked: str, number: str) -> None:
    text = f"a <!-- = own: {asked} -->?<!-- / --> b"
    assert words.filled(text) == f"a <!-- = own: {asked} -->{number}<!-- / --> b"
    assert words.filled(words.filled(text)) == words.filled(text)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("x@0.3 - full@1; t; test; below mean", "do not say 'below': \\+15.00"),
        ("x@0.3 - full@1; u; own; above mean", "do not say 'above': -40"),
        ("x@0.3 - full@1; all; own; below each", "do not say 'below': -40.00 to \\+15.00"),
        ("x@0.3 - full@1; t; test; tie mean", "do not say 'tie'"),
        ("x@0.1; t; test; mean", "0 results of x at 0.1 on t"),
        ("x@0.3; u; test; mean", "u has no test split"),
        ("x@0.3; t; test; median", "'median' is none of mean, sd"),
        ("x@0.3; t; test; beyond mean", "none of .* after above, below, tie"),
        ("x@0.3 / full@1; t; test; above mean", "no 'above mean' of a ratio"),
        ("x@0.3 - full@1; t; test; below interval", "no 'below interval' of a difference"),
        ("flops of x; u; validation; mean", "a target not reached"),
    ],
)
def test_what_the_records_deny_is_refused(words: ModuleType, asked: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        words.filled(f"<!-- = own: {asked} -->1<!-- / -->")


@pytest.mark.parametrize(
    "mark",
    [
        "<!-- = own: x@0.3; t; test -->1<!-- / -->",
        "<!-- = own: x@0.3; t; test; mean -->1",
        "<!-- = own: x@0.3; t; test; mean -->1\n<!-- / -->",
        "<!-- = own: x@0.3; t; test; mean -->1 <b>2<!-- / -->",
    ],
)
def test_what_is_no_whole_mark_is_refused(words: ModuleType, mark: str) -> None:
    with pytest.raises(ValueError, match=r"1 marks .* not as words.py says"):
        words.filled(f"a {mark} b <!-- = own: x@0.3; t; test; mean -->1<!-- / -->")


def test_records_may_be_of_several_files(words: ModuleType) -> None:
    lines = (words.RECORDS / "own.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("first", lines[:3]), ("rest", lines[3:])):
        (words.RECORDS / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    text = "<!-- = first+rest: x@0.3; t; test; mean -->?<!-- / -->"
    assert "-->80.0<!--" in words.filled(text)
