"""WikiText-2 (Merity et al. 2017): running text, in its schema on the Hugging Face hub."""

from __future__ import annotations

from rgft.tasks.columns import require_column
from rgft.tasks.folder import read_split
from rgft.tasks.hub import HubTask, local_folder, tables_of

WIKITEXT = HubTask(
    name="wikitext",
    description="articles of Wikipedia (WikiText-2, Merity et al. 2017)",
    path="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    folders=("wikitext/wikitext-2-raw-v1", "wikitext"),
    input_columns=("text",),
)
SPLIT = "test"


def load_general_text() -> str:
    """Its test split as one text.

    Raises:
        InputError: It is neither in a folder nor on the hub, or has no texts.
    """
    folder = local_folder(WIKITEXT)
    table = tables_of(WIKITEXT)[0][SPLIT] if folder is None else read_split(folder, SPLIT)
    rows = table.columns[require_column(table, WIKITEXT.input_columns[0], "the file")]
    return "\n\n".join(str(row) for row in rows if row is not None)
