"""From the records of a run to figures and one HTML page that opens offline."""

from __future__ import annotations

from pathlib import Path

from rgft.atomic import atomic_path, write_text_atomically
from rgft.report.page import render_page
from rgft.report.png import error_map_png
from rgft.report.run import Run, load_run

__all__ = ["Run", "load_run", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` and `error_map.png` into the folder of a run.

    Each file is replaced as a whole. A run without an error map gets no picture, and one that an
    earlier call left is removed.

    Args:
        run_dir: Folder with `run.json` and `error_map.parquet`.

    Returns:
        Path of `report.html`.

    Raises:
        InputError: A record is missing, damaged, or something else than a run's record.
    """
    run = load_run(run_dir)
    page = run_dir / "report.html"
    picture = error_map_png(run)
    if picture is None:
        (run_dir / "error_map.png").unlink(missing_ok=True)
    else:
        with atomic_path(run_dir / "error_map.png") as unfinished:
            unfinished.write_bytes(picture)
    write_text_atomically(page, render_page(run))
    return page
