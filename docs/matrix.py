"""What works where, as a page: `python docs/matrix.py` writes it from `tests/matrix/*.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "integrations" / "matrix.md"
LOCKS = {"oldest": ROOT / "constraints-oldest.txt", "newest": ROOT / "constraints.txt"}
LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "trl"),
    *("lightning", "sentence-transformers"),
)
STATES = ("test", "refused", "not_applicable")
HEAD = """# What works where

Each row comes from `tests/matrix/`, and this page from `docs/matrix.py`: a cell is a test that
runs, a refusal with its reason, or something that has no meaning there. What is not listed is not
tested, and a test that needs a package which `make setup` leaves out runs only where that is
installed.

On CPUs Accelerate, and so the Trainer and what builds on it, ignores float16 and FSDP2, and
Lightning makes bfloat16 of float16. PyTorch can do both there, and the tests switch them on; what
follows is the frameworks' own. Nothing here ran on a GPU.
"""


def cells() -> list[dict[str, Any]]:
    """All cells, each with a row, a column and one state."""
    found: list[dict[str, Any]] = []
    for path in sorted((ROOT / "tests" / "matrix").glob("*.yaml")):
        for cell in yaml.safe_load(path.read_text(encoding="utf-8")):
            given = cell.keys() & set(STATES)
            if len(given) != 1 or not {"row", "column"} <= cell.keys() or not all(cell.values()):
                raise ValueError(f"{path.name}: {cell} must have row, column and one of {STATES}")
            found.append(cell)
    return found


def versions(path: Path) -> dict[str, str]:
    """The packages that a file of constraints pins."""
    lines = path.read_text(encoding="utf-8").split()
    return {
        name.lower().replace("_", "-"): pin for name, _, pin in (x.partition("==") for x in lines)
    }


def _tested_versions() -> list[str]:
    locks = [versions(path) for path in LOCKS.values()]
    rows = [" | ".join([name, *(lock[name] for lock in locks)]) for name in LIBRARIES]
    return [
        "## Versions\n",
        "`make test` runs with the newest, `make test-oldest` the tests that touch these libraries",
        "with the oldest.\n",
        f"| | {' | '.join(LOCKS)} |",
        "|---|---|---|",
        *(f"| {row} |" for row in rows),
        "",
    ]


def page() -> str:
    """The page as it should be."""
    lines = [HEAD, *_tested_versions()]
    rows = dict.fromkeys(cell["row"] for cell in cells())
    for row in rows:
        lines += [f"## {row}\n", "| | |", "|---|---|"]
        for cell in cells():
            if cell["row"] == row:
                lines.append(f"| {cell['column']} | {_shown(cell)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(cell: dict[str, Any]) -> str:
    if "test" in cell:
        shown = f"`{cell['test'].partition('tests/')[2]}`"
        return f"{shown}, where {cell['needs']} is installed" if "needs" in cell else shown
    if "refused" in cell:
        return f"refused, because {cell['refused']}"
    return f"not applicable: {cell['not_applicable']}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
