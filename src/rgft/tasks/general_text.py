"""WikiText-2 (Merity et al. 2017): running text, in its schema on the Hugging Face hub."""

from __future__ import annotations

from rgft.tasks.columns import require_column
from rgft.tasks.hub import HubTask, is_available, tables_of

WIKITEXT = HubTask(
    name="wikitext",
    description="articles of Wikipedia (WikiText-2, Merity et al. 2017)",
    path="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    folders=("wikitext/wikitext-2-raw-v1", "wikitext"),
    input_columns=("text",),
)


def load_general_text() -> str:
    """Its test split as one text.

    Raises:
        InputError: It is neither in a folder nor on the hub, or has no texts.
    """
    tables, _ = tables_of(WIKITEXT)
    table = tables.get("test", tables["train"])
    rows = table.columns[require_column(table, WIKITEXT.input_columns[0], "the file")]
    return "\n\n".join(str(row) for row in rows if row is not None)


def has_general_text() -> bool:
    """Whether it can be loaded without the network."""
    return is_available(WIKITEXT)
