"""Records of the harnesses that came before `rgft bench`, in its form; once a line.

python benchmarks/convert.py OLD.jsonl benchmarks/records/budget_grid.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from rgft.bench.journal import append_record, read_records

EXTENDS = {  # what the grid's arms add to each other
    "full-small": ("full", {"batch_size": 8, "group_by_length": True}),
    "full-small-tuned": ("full-small", {"balance": 0.5, "adam_beta2": 0.98}),
    "full-small-cut": ("full-small", {"keep_layers": 5}),
}


def converted(old: dict[str, Any], name: str) -> dict[str, Any]:
    """One record in the present form."""
    cell = old.get("cell", {})
    arm = cell.get("arm", old["method"])
    extends, changes = EXTENDS.get(arm, (None, {}))
    kept = {key: value for key, value in old.items() if key != "cell"}
    budget = cell.get("budget", old["budget"])
    return {
        "status": "finished",
        "key": hashlib.sha256(old["command"].encode()).hexdigest()[:16],
        "suite": name,
        **kept,
        "arm": arm,
        "budget": 1.0 if budget is None else budget,
        "rate": cell["rate"] if cell else old["lr"],
        "rows": {"train": old.get("rows", {}).get("train") or rows(old)},
        "extends": extends,
        "changes": changes,
    }


def rows(old: dict[str, Any]) -> int:
    """Training rows that were asked for; 0 for all, whose number the record does not say."""
    parts = shlex.split(old["command"])
    at = "--max-train-rows"
    return int(parts[parts.index(at) + 1]) if at in parts else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    there = {record["key"] for record in read_records(given.new)}
    for line in given.old.read_text(encoding="utf-8").splitlines():
        record = converted(json.loads(line), given.new.stem)
        if record["key"] not in there:
            append_record(given.new, record)
            there.add(record["key"])


if __name__ == "__main__":
    main()
