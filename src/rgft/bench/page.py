"""One HTML page about many runs; it opens offline and fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rgft.bench import ablations, maps
from rgft.bench.cells import by_key
from rgft.bench.figures import MOST_MAPS, error_maps, profile, quality_cost, waterfall
from rgft.bench.journal import FILE, read_records
from rgft.bench.record import record_of_run
from rgft.bench.results import Result, results, shown
from rgft.bench.table import Table
from rgft.bench.tables import all_tables
from rgft.errors import InputError
from rgft.records import RUN_FILE, read_run
from rgft.report.page import Panel, panel, template
from rgft.spending import parse_budget

Record = Mapping[str, Any]
LABELS = ("key", "status", "arm", "task", "budget", "rate")  # that every record has
MEASURED = ("seed", "model", "metric", "metrics", "flops", "seconds")  # if it finished


def load(places: Sequence[Path]) -> list[dict[str, Any]]:
    """Records from folders of benches, folders of runs, and files of records.

    Raises:
        InputError: A place holds none.
    """
    records = [record for place in places for record in _load(place)]
    if not records:
        raise InputError(f"no record in {', '.join(map(str, places))}; run `rgft bench` first")
    return records


def _load(place: Path) -> list[dict[str, Any]]:
    if (place / RUN_FILE).is_file() and not (place / FILE).is_file():
        return [_of_run(place)]
    file = place if place.is_file() else place / FILE
    if file.is_file():
        return [_checked(file, record) for record in read_records(file)]
    raise InputError(
        f"{place} holds no records; give a folder of `rgft bench` ({FILE}) or of `rgft train` "
        f"({RUN_FILE}), or a file of records"
    )


def _checked(place: Path, record: dict[str, Any]) -> dict[str, Any]:
    needed = LABELS if record.get("status") == "failed" else (*LABELS, *MEASURED)
    missing = [name for name in needed if name not in record]
    if missing:
        raise InputError(
            f"{place} has a record without {missing[0]!r}: none of `rgft bench` or `rgft train`; "
            "give one, or leave it out"
        )
    return record


def _of_run(folder: Path) -> dict[str, Any]:
    """A single run as a record; its method is its arm."""
    run = read_run(folder)
    if run.get("status") != "finished":
        raise InputError(f"the run in {folder} has not finished; go on with it, or leave it out")
    budget = run["budget"]
    parsed = parse_budget(budget or "1")
    share = budget if parsed.auto or parsed.share is None else parsed.share
    labels = {"status": "finished", "key": str(folder.resolve()), "suite": None, "extends": None}
    named = {"arm": run["method"], "task": run["task"], "model": run["model"]}
    told = {**labels, **named, "budget": share, "rate": run["lr"], **record_of_run(folder)}
    return _checked(folder, told)


def render(records: Sequence[Record], title: str) -> str:
    """The page; all text in it is escaped."""
    latest = list(by_key(list(map(dict, records))).values())
    found = results(latest)
    shown = panels(found)
    failed = [record for record in latest if record["status"] == "failed"]
    return template("bench.html.jinja").render(
        title=title,
        subtitle=_counted(latest),
        failed=len(failed),
        tables=[
            *all_tables(found),
            *maps.all_tables(found),
            *_notes(latest, found),
            *_failures(latest),
        ],
        panels=shown,
        ablations=ablation_sections(found),
        sources=_sources(latest),
        plotly_js=Markup(get_plotlyjs()) if any(one.figure for one in shown) else None,
    )


def panels(found: Sequence[Result]) -> list[Panel]:
    """The figures in reading order."""
    return [
        panel(quality_cost(found, "share"), "quality-flops", "Quality over FLOPs",
              "Every arm at every budget; bars from the worst to the best seed. Up and to the left "
              "is better.", "No run has finished."),
        panel(quality_cost(found, "seconds"), "quality-seconds", "Quality over seconds",
              "The same over the seconds of training, the method's own work included: the "
              "processor's where they are recorded, else on the wall, which compare little where "
              "runs shared a machine.", "No run has finished."),
        panel(profile(found), "profile", "Performance profile",
              "Share of tasks on which an arm reaches 99% of full fine-tuning's best within a "
              "factor of the cheapest arm's FLOPs (Dolan and More 2002); tasks on which full "
              "fine-tuning is at chance are left out.",
              "No arm reaches 99% of full fine-tuning, or that was not run, or is at chance."),
        panel(waterfall(found), "levers", "What each lever adds",
              "Points that an arm gains or loses over the one that it extends, paired by task and "
              "seed, with 95% bootstrap intervals; a bar begins where the bar of that arm ended.",
              "No arm extends another."),
        panel(error_maps(found), "error-maps", "Error maps",
              "Each component's share of the error, embeddings at the bottom, over a run's course; "
              f"the first seed of at most {MOST_MAPS} arms, tasks and budgets.",
              "No error map was recorded."),
    ]  # fmt: skip


def ablation_sections(found: Sequence[Result]) -> list[tuple[Table, Panel]]:
    """A table and a figure for every ablation."""
    caption = (
        "Points gained or lost against the same arm without the change, by task; bars are 95% "
        "bootstrap intervals over seeds; with three of them that is their range, about a 75% one."
    )
    return [
        (table, panel(ablations.figure(one, found), f"ablation-{number}", one.title, caption, ""))
        for number, (one, table) in enumerate(ablations.with_tables(found))
    ]


def markdown(records: Sequence[Record], title: str = "Results") -> str:
    """The tables as Markdown, those of failed cells at the end."""
    latest = list(by_key(list(map(dict, records))).values())
    found = results(latest)
    head = f"# {title}\n\n{_counted(latest)}; {'; '.join(map(': '.join, _sources(latest)))}.\n\n"
    summary = ablations.summary(found)
    told = [
        *all_tables(found),
        *maps.all_tables(found),
        *([summary] if summary.rows else []),
        *_notes(latest, found),
        *_failures(latest),
    ]
    return head + "\n\n".join(table.section("##") for table in told) + "\n"


def _counted(records: Sequence[Record]) -> str:
    failed = sum(record["status"] == "failed" for record in records)
    return f"{len(records) - failed} finished runs, {failed} failed"


def _notes(records: Sequence[Record], found: Sequence[Result]) -> list[Table]:
    """A table of what the runs had to say, and of what is to be said of them, if anything is."""
    said: dict[tuple[str, str, str], int] = {}
    for record in records:
        for text in record.get("notes", ()):
            key = (str(record["task"]), f"{record['arm']} at {record['budget']}", text)
            said[key] = said.get(key, 0) + 1
    for result in found:
        if text := _mixed(result):
            key = (shown(result.problem, found), f"{result.arm} at {result.budget}", text)
            said[key] = len(result.runs)
    rows = [[task, arm, str(count), text] for (task, arm, text), count in said.items()]
    header = ["task", "arm and budget", "runs", "note"]
    return [Table("Notes", "What runs warned of.", header, rows)] if rows else []


def _mixed(result: Result) -> str:
    """What to say of runs of one arm that differ in more than their seeds."""
    recipes = [
        {
            *_recipe(str(run.get("command") or "")),
            *(f"--extend {one}" for one in run.get("extensions", ())),
        }
        for run in result.runs.values()
    ]
    apart = sorted({o for one in recipes for o in one if not all(o in r for r in recipes)})
    return f"some of these runs have {', '.join(apart)}, and others not" if apart else ""


def _recipe(command: str) -> set[str]:
    """The options of a command, but for the seed, the learning rate, and places of files.

    >>> sorted(_recipe("rgft train --model ./mine --task trec --seed 1 --lr 1e-4 --no-dropout"))
    ['--no-dropout', '--task trec']
    """
    options = {f"--{part.strip()}" for part in f" {command}".split(" --")[1:]}
    others = tuple(f"--{name} " for name in ("seed", "lr", "model", "data", "extend"))
    return {option for option in options if not option.startswith(others)}


def _failures(records: Sequence[Record]) -> list[Table]:
    """A table of the cells that failed, if there are some."""
    failed = [record for record in records if record["status"] == "failed"]
    names = ("task", "arm", "budget", "rate", "seed")
    rows = [
        ["own" if record[name] is None else str(record[name]) for name in names]
        + [str(record["reason"])]
        for record in failed
    ]
    header = [*names, "reason"]
    return [Table("Failed cells", "They are in no number.", header, rows)] if rows else []


def _sources(records: Sequence[Record]) -> list[tuple[str, str]]:
    told: dict[str, set[str]] = {}
    for record in records:
        for name in ("suite", "code_revision"):
            if record.get(name) is not None:
                told.setdefault(name, set()).add(str(record[name]))
        for group in ("hardware", "versions"):
            for name, value in (record.get(group) or {}).items():
                told.setdefault(f"{group}: {name}", set()).add(str(value))
    return [(name, ", ".join(sorted(values))) for name, values in told.items()]
