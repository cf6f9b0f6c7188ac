"""The images of a table: files as bytes, as the hub's tables hold them."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from rgft.errors import InputError
from rgft.tasks.columns import require_column
from rgft.tasks.tables import Table, one_line

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of Pillow


def find_image_column(table: Table, label_column: str) -> str | None:
    """The column of images, if there is one: the hub's `{"bytes": ..., "path": ...}` in each row.

    Raises:
        InputError: There are several.
    """
    found = [
        name
        for name, values in table.columns.items()
        if name != label_column and _holds_images(values)
    ]
    if len(found) > 1:
        raise InputError(
            f"{table.source}: {found} each hold images, and a task has one column of them; remove "
            "the others, or name texts with --text-columns"
        )
    return found[0] if found else None


def check_images(table: Table, column: str) -> list[bytes]:
    """The images of a column, each the bytes of a file that begins like an image.

    Raises:
        InputError: The column is missing, or a row has no image in it.
    """
    values = table.columns[require_column(table, column, "the file")]
    images = []
    for row, value in enumerate(values, start=1):
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise InputError(
                f"{table.source}: row {row} has no image in column {column!r} "
                f"({one_line(repr(value), 60)}); give the bytes of a file, as the hub's Parquet "
                "files do, or remove the row"
            )
        _check_header(table, column, row, content)
        images.append(content)
    return images


def decode_image(content: bytes, place: str) -> Image.Image:
    """An image in RGB.

    Args:
        content: Its file.
        place: Where it is from, for the error.

    Raises:
        InputError: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except UNREADABLE as problem:
        raise InputError(
            f"{place}: an image of {len(content)} bytes cannot be decoded ({one_line(problem)}); "
            "remove the row"
        ) from problem


def _check_header(table: Table, column: str, row: int, content: bytes) -> None:
    try:
        Image.open(io.BytesIO(content)).close()
    except UNREADABLE as problem:
        raise InputError(
            f"{table.source}: row {row} of column {column!r} is no image that Pillow reads "
            f"({one_line(problem, 60)}); correct or remove it"
        ) from problem


def _holds_images(values: Sequence[object]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(
        isinstance(value, dict) and value.keys() == {"bytes", "path"} for value in present
    )
