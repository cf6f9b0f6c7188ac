"""Tables on standard output."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from rgft.report import amounts


def show(table: Table) -> None:
    """Print a table with nothing cut off: folded on a terminal, elsewhere as wide as it is."""
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    if not sys.stdout.isatty():
        unlimited = console.options.update(max_width=sys.maxsize)
        console.width = Measurement.get(console, unlimited, table).maximum
    console.print(table)


def summary(record: dict[str, Any]) -> Table:
    """The figures of a finished run."""
    table = Table(
        title=escape(f"{record['method']} on {record['task']} ({record['model']})"),
        show_header=False,
    )
    for split, values in record["metrics"].items():
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in values.items() if value is not None
        )
        table.add_row(split, shown)
    flops, seconds = record["flops"], record["seconds"]
    if auto := record.get("budget_auto"):
        table.add_row("stages", amounts.stages(auto))
    table.add_row("FLOPs", f"{flops['spent']:.3g}, {flops['share']:.1%} of full fine-tuning")
    share = seconds["overhead"] / seconds["train"] if seconds["train"] else 0.0
    table.add_row(
        "seconds of training", f"{seconds['train']:.1f}, of which {share:.1%} in the method"
    )
    if (layers := record.get("layers")) and layers["kept"] < layers["of"]:
        table.add_row("layers kept", f"{layers['kept']} of {layers['of']}")
    if forgetting := record.get("forgetting"):
        table.add_row("forgetting", amounts.forgetting(forgetting))
    peak = record["peak_memory_bytes"]
    table.add_row("peak memory", "not known" if peak is None else f"{peak / 2**30:.2f} GiB")
    updated = record["parameters"]["updated_per_step"]["mean"]
    table.add_row(
        "parameters updated a step", f"{updated:,.0f} of {record['parameters']['total']:,}"
    )
    return table
