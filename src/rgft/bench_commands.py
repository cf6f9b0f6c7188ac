"""The commands on many runs: rgft bench | report | maps."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rgft.errors import InputError
from rgft.launch import launched


def place(text: str) -> Path:
    """A path that is not empty, as that of a shell's variable that is not set."""
    if not text.strip():
        raise click.BadParameter("it is empty; give a path")
    return Path(text)


def check_new_file(option: str, path: Path | None) -> None:
    """See before the work, not after it, whether a file can be put there.

    Raises:
        InputError: It is a folder, or there is no folder for it.
    """
    if path is not None and path.is_dir():
        raise InputError(f"{path} is a folder; give {option} a file in it")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}; make it, or give another {option}")


def _note(text: str) -> None:
    print(f"rgft: note: {text}", file=sys.stderr)


@click.command()
@click.argument("suite_file", metavar="SUITE.yaml", type=Path)
@click.option("--output-dir", type=place, required=True, help="Folder of the records.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Cells at a time."
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each cell."
)
@click.option("--ray", help="Run cells on Ray: 'local', 'auto' or the address of a cluster.")
@click.option("--retry-failed", is_flag=True, help="Run cells that have failed again.")
@click.option("--keep-runs", is_flag=True, help="Keep the folder of every run.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say how much would run, look for what it needs, and run nothing.",
)
@click.option("--extend", multiple=True, help="Python file with METHODS or TASKS; repeatable.")
def bench(  # noqa: PLR0913, PLR0917 - its options
    suite_file: Path,
    output_dir: Path,
    workers: int,
    threads: int,
    ray: str | None,
    retry_failed: bool,
    keep_runs: bool,
    dry_run: bool,
    extend: tuple[str, ...],
) -> None:
    """Run the cells of a suite that have no record yet; a further call goes on."""
    if launched() > 1:
        raise InputError(
            f"rgft bench was started in {launched()} processes and starts its own (--workers); "
            "start it in one"
        )
    from rgft import extensions  # noqa: PLC0415 - what follows takes seconds to import
    from rgft.bench.cells import (  # noqa: PLC0415
        by_key,
        check_arms_differ,
        settled,
        shown_labels,
    )
    from rgft.bench.journal import FILE, read_cells  # noqa: PLC0415
    from rgft.bench.running import outcome, run_suite  # noqa: PLC0415
    from rgft.bench.suite import load_suite  # noqa: PLC0415

    extensions.extend(extend)
    suite = load_suite(suite_file, extend)
    check_arms_differ(suite)
    if output_dir.is_file():
        raise InputError(f"{output_dir} is a file; give --output-dir a folder")
    records = by_key(read_cells(output_dir / FILE))
    before = outcome(suite, records)
    left = before.total - before.finished - (0 if retry_failed else len(before.failed))
    print(f"{suite.name}: {before.total} cells, {before.finished} finished, "
          f"{len(before.failed)} failed, {left} to run at most")  # fmt: skip
    others = {r.get("suite") for r in records.values()} - {suite.name}
    if others:
        names = ", ".join(sorted(map(str, others)))
        said = f"{output_dir} has records of {names}, too; arms of one name are shown as one"
        _note(f"{said}; give a suite a folder of its own")
    if left:
        from rgft.bench.checks import check_places  # noqa: PLC0415

        records = {k: r for k, r in records.items() if not retry_failed or r["status"] != "failed"}
        absent = check_places(settled(suite, records)[1])
        if absent:
            _note(
                f"not on this machine, to be fetched by the first run: {', '.join(absent)} "
                "(`rgft data` says from where, and where else it may lie)"
            )
    if dry_run:
        return
    pool = _workers(ray, workers, threads, output_dir, keep_runs)
    again = f"go on with the same command; finished cells are in {output_dir / FILE}"
    with _stoppable():
        try:
            after = run_suite(suite, output_dir, pool, retry_failed=retry_failed)
        except KeyboardInterrupt:
            print(f"rgft: stopped; {again}", file=sys.stderr)
            raise SystemExit(1) from None
    see = ["rgft", "report", str(output_dir), "--output", f"{suite.name.replace('/', '-')}.html"]
    print(f"{after.finished} finished, {len(after.failed)} failed; see it with: {shlex.join(see)}")
    for record in after.failed:
        labels = {name: record[name] for name in ("task", "arm", "budget", "rate", "seed")}
        print(f"rgft: failed: {shown_labels(labels)}: {record['reason']}", file=sys.stderr)
    if after.failed:
        raise SystemExit(1)


def _workers(ray: str | None, slots: int, threads: int, folder: Path, keep: bool) -> Any:
    if ray is None:
        from rgft.bench.workers import LocalWorkers  # noqa: PLC0415

        return LocalWorkers(slots, threads, folder, keep=keep)
    if keep:
        raise InputError("--keep-runs goes without --ray: runs end on the machine they ran on")
    from rgft.bench.ray_workers import RayWorkers  # noqa: PLC0415

    return RayWorkers(ray, slots, threads, folder)


@contextmanager
def _stoppable() -> Iterator[None]:
    """A polite kill is taken for Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@click.command()
@click.argument("places", metavar="DIR...", nargs=-1, required=True, type=Path)
@click.option("--output", type=place, required=True, help="The HTML file.")
@click.option("--markdown", type=place, help="Also the tables, as Markdown.")
@click.option("--title", help="Of the page.  [the file's name]")
def report(
    places: tuple[Path, ...], output: Path, markdown: Path | None, title: str | None
) -> None:
    """Make one offline page of the runs in folders of `rgft bench` or `rgft train`."""
    from rgft.atomic import write_text_atomically  # noqa: PLC0415
    from rgft.bench import page  # noqa: PLC0415

    check_new_file("--output", output)
    check_new_file("--markdown", markdown)
    if markdown is not None and markdown.resolve() == output.resolve():
        raise InputError(f"--output and --markdown are both {output}; give two files")
    records = page.load(places)
    write_text_atomically(output, page.render(records, title or output.stem))
    print(f"page: {output}")
    if markdown is not None:
        write_text_atomically(markdown, page.markdown(records, title or output.stem))
        print(f"tables: {markdown}")


@click.command("maps")
@click.argument("places", metavar="DIR...", nargs=-1, required=True, type=Path)
@click.option("--markdown", type=place, help="Write the tables there, and do not print them.")
def compare_maps(places: tuple[Path, ...], markdown: Path | None) -> None:
    """Compare the error maps of runs: over seeds, tasks, methods and a run's course."""
    from rgft.atomic import write_text_atomically  # noqa: PLC0415
    from rgft.bench.maps import (  # noqa: PLC0415
        LEAST_COMPONENTS,
        all_tables,
        comparable,
        run_maps,
    )
    from rgft.bench.page import load  # noqa: PLC0415
    from rgft.bench.results import results, shown  # noqa: PLC0415

    check_new_file("--markdown", markdown)
    found = results(load(places))
    maps = run_maps(found)
    tables = all_tables(found)
    if not tables:
        where = ", ".join(map(str, places))
        raise InputError(
            f"nothing to compare: {len(maps)} error maps in {where}; give runs of "
            f"several seeds, tasks or methods with at least {LEAST_COMPONENTS} components in common"
        )
    if short := [one for one in maps if not comparable([one.end])]:
        names = ", ".join(dict.fromkeys(f"{shown(one.problem, found)} {one.arm}" for one in short))
        _note(
            f"{len(short)} of {len(maps)} error maps are left out, since fewer than "
            f"{LEAST_COMPONENTS} of their components were scored: {names}"
        )
    text = "\n\n".join(table.section("##") for table in tables)
    if markdown is None:
        print(text)
    else:
        write_text_atomically(markdown, f"{text}\n")
        print(f"tables: {markdown}")
