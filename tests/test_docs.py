"""The documentation runs, is complete, and builds without reaching out."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import rgft
import tiny_chat
from rgft.cli import app
from rgft.tasks.columns import ID_NAMES, LABEL_NAMES, PAIR_NAMES, TEXT_NAMES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \|", re.MULTILINE)
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 20}


def snippets(page: Path) -> str:
    """All Python of a page as one program, its lines where they are in the page."""
    text = page.read_text(encoding="utf-8")
    program = ""
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        program += "\n" * (line - program.count("\n")) + block[1]
    return program


PAGES = sorted(p for p in [README, *DOCS.rglob("*.md")] if snippets(p))


def what_the_reader_has() -> dict[str, Any]:
    """README speaks of a loop or Trainer that is there already."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_attention_heads=2, **SHAPE))
    batch = {"input_ids": torch.randint(20, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": [batch] * 12,
        "train_dataset": [
            {"input_ids": torch.randint(20, (6,)), "labels": i % 2} for i in range(8)
        ],
        "args": TrainingArguments(
            "out", max_steps=12, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        ),
    }


# peft asks transformers by a name that is going out of use
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
# and Lightning asks torch so
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "timm.md":
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    names = what_the_reader_has() if page == README else {}
    if page.name == "llm.md":
        names = {"model": tiny_chat.llama(), "tokenizer": tiny_chat.tokenizer()}
    names["__name__"] = "snippet"
    exec(compile(snippets(page), str(page), "exec"), names)
    if page == README:
        assert rgft.ErrorMap.from_parquet("error_map.parquet").history.steps.tolist()[-1] == 12


def test_pages_with_snippets_are_found() -> None:
    names = {page.name for page in PAGES}
    assert {"README.md", "index.md", "getting-started.md", "extending.md", "records.md"} <= names


def table(text: str, heading: str) -> dict[str, str]:
    """First two columns of the table under a heading."""
    section = re.split(r"^## ", text.split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    return dict(ROW.findall(section))


def test_readme_lists_the_methods_as_they_are() -> None:
    listed = table(README.read_text(encoding="utf-8"), "Methods")
    heading = listed.pop("--method")
    assert heading == "what it does"
    assert listed == {name: method.summary for name, method in rgft.METHODS.items()}


def test_every_method_has_a_card() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    cards = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(cards) == list(rgft.METHODS)
    for name, card in cards.items():
        assert "**What it does.**" in card and "**Does not help**" in card
        rate = f"{rgft.METHODS[name].lr:.0e}".replace("e-0", "e-")
        settings = card.split("**Settings**")[1]
        assert f"Learning rate {rate}" in " ".join(settings.split()), name


def test_every_signal_and_policy_can_be_chosen() -> None:
    text = (DOCS / "how-to-choose.md").read_text(encoding="utf-8")
    missing = {name for name in [*rgft.SIGNALS, *rgft.POLICIES] if f"`{name}`" not in text}
    assert not missing


def test_every_setting_is_explained() -> None:
    listed = ROW.findall((DOCS / "command-line.md").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(rgft.Config)}
    not_set = {"granularity", "total_steps", "seed"}
    assert fields - not_set <= {name for name, _ in listed}


def test_every_column_name_that_is_recognised_is_listed() -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = text.split("### Columns\n", 1)[1].split("\n### ", 1)[0]
    rows = dict(re.findall(r"^\| (label|one text|two texts) \| (.*) \|$", section, re.M))
    named = {kind: re.findall(r"`([^`]+)`", row) for kind, row in rows.items()}
    assert named["label"] == list(LABEL_NAMES)
    assert named["one text"] == [*filter(None, ID_NAMES), "..._id"]
    assert named["two texts"] == [*TEXT_NAMES, *(name for pair in PAIR_NAMES for name in pair)]


def commands(group: click.Group, name: str = "rgft") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name."""
    for part, command in group.commands.items():
        yield f"{name} {part}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {part}")


COMMANDS = list(commands(app))


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_and_option_is_explained(name: str, command: click.Command) -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"## {name}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    options = [p.opts[0] for p in command.params if isinstance(p, click.Option)]
    assert [option for option in options if f"`{option}" not in section] == []


def test_tables_of_bypass_are_what_the_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measured = importlib.import_module("bypass")
    text = (ROOT / "benchmarks" / "records" / "bypass.json").read_text(encoding="utf-8")
    tables = measured.page(json.loads(text)["results"])
    assert tables.count("\n|") > 20
    assert tables in (DOCS / "bypass.md").read_text(encoding="utf-8")


def test_tables_of_memory_and_scale_are_what_the_records_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (DOCS / "budget.md").read_text(encoding="utf-8")
    records = {
        name: json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text("utf-8"))
        for name in ("memory", "scale")
    }
    memory, scale = (importlib.import_module(name) for name in records)
    shown = [
        memory.table(records["memory"]["results"]),
        memory.by_layers(records["memory"]["by_frozen_layers"]),
        scale.table(records["scale"]["results"]),
        scale.held(records["scale"]["results"]),
    ]
    assert all(text.count("\n") >= 2 for text in shown)
    assert [text for text in shown if text not in page] == []


def test_page_of_the_language_model_is_what_the_records_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    llm, table = (importlib.import_module(name) for name in ("llm", "llm_table"))
    page = (DOCS / "integrations" / "llm.md").read_text(encoding="utf-8")
    shown = page.split("language-models -->\n")[1].split("\n<!-- /records -->")[0]
    assert shown == table.page(llm.read(ROOT / "benchmarks" / "records" / "llm.jsonl"))


def api() -> set[str]:
    """What the page of the API shows, or names."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    return {*re.findall(r"^::: (\S+)$", text, re.M), *re.findall(r"`(rgft\.\w+)`", text)}


def test_every_public_name_is_in_the_api_page() -> None:
    public = {n for n, v in vars(rgft).items() if n[0] != "_" and not inspect.ismodule(v)}
    assert len([name for name in public if name.islower()]) > 3  # functions, too
    assert {name for name in public if f"rgft.{name}" not in api()} == set()


def test_every_signal_and_policy_is_in_the_api_page() -> None:
    """By itself, or with the module that it is in."""
    signals = {signal.score for signal in rgft.SIGNALS.values()}
    policies = {policy.rule for policy in rgft.POLICIES.values()}
    assert len(signals) == len(rgft.SIGNALS)
    named = {f"{f.__module__}.{f.__name__}": f.__module__ for f in signals | policies}
    assert {name for name, module in named.items() if not {name, module} & api()} == set()


def test_what_the_pages_import_is_in_the_api_page() -> None:
    """From modules of ours that callbacks and checkpoints come from."""
    pages = [README, *DOCS.rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    imported = re.findall(r"^from (rgft\.(?:integrations|adapters)\.\w+) import (.+)$", text, re.M)
    names = {f"{module}.{name}" for module, listed in imported for name in listed.split(", ")}
    assert len(names) > 3
    assert names - api() == set()


def test_readme_says_what_every_module_is() -> None:
    tree = README.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    package = ROOT / "src" / "rgft"
    files = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()}
    described = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    assert described == files | folders


@pytest.mark.parametrize(
    "page", [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_site_builds_and_reaches_out_to_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert len(pages) > 10
    loaded = re.compile(r"""(?:src|href)=["']?(?:https?:)?//(?!www\.w3\.org)""")
    assert [found for page in pages for found in loaded.findall(page)] == []
    # docstrings arrive as Markdown: no bare doctests, no TeX roles
    assert [left for page in pages for left in re.findall("<blockquote>|:math:", page)] == []
