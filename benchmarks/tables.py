"""Fill the tables of README and docs from records; no number in them is typed by hand.

A page says where a table goes, of which records (a file of them, or several), and which one:

    <!-- records: benchmarks/records/comparison.jsonl runs -->
    <!-- /records -->

python benchmarks/tables.py          # write
python benchmarks/tables.py --check  # fail if a page is not what the records say
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import gain_table
import llm
import llm_table
import words

from rgft.bench import ablations, areas, beyond_headline, maps, tables
from rgft.bench.journal import read_records
from rgft.bench.maps import traits
from rgft.bench.page import load
from rgft.bench.results import results

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"(<!-- records: ((?:\S+ )+)(\S+) -->\n).*?(<!-- /records -->)", re.DOTALL)
TABLES = {
    "ablations": ablations.summary,
    "areas": areas.areas,
    "calibration": beyond_headline.calibration,
    "perplexity": beyond_headline.perplexity,
    "other-domains": beyond_headline.other_domains,
    "forgetting": beyond_headline.forgetting,
    "leaderboard": tables.leaderboard,
    "against-full": tables.against_full,
    "against-others": tables.ours_against,
    "levers": tables.lever_table,
    "targets": tables.targets,
    "runs": tables.runs,
    "traits": traits.of_traits,
    "with-traits": traits.with_traits,
}


def filled(text: str) -> str:
    """A page with every table and number between marks made anew."""

    def table(match: re.Match[str]) -> str:
        paths = [ROOT / path for path in match[2].split()]
        if match[3] == "language-models":
            content = llm_table.page(llm.read(paths[0]))
        elif match[3] == "gain":
            content = gain_table.page([one for path in paths for one in read_records(path)])
        elif match[3] == "maps":
            several = maps.all_tables(results(load(paths)))
            content = "\n\n".join(one.section("###") for one in several)
        else:
            content = TABLES[match[3]](results(load(paths))).markdown()
        return f"{match[1]}{content}\n{match[4]}"

    return words.filled(MARK.sub(table, text))


def pages() -> list[Path]:
    """Every page that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in pages():
        text = path.read_text(encoding="utf-8")
        wanted = filled(text)
        if wanted != text and check:
            sys.exit(f"{path.name} differs from the records: run python benchmarks/tables.py")
        if wanted != text:
            path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
