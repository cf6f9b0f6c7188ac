"""Images to pixel batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rgft.batches import EVALUATION_BATCH, Example, labelled
from rgft.errors import InputError
from rgft.models import load_image_classifier, load_image_processor
from rgft.tasks.images import decode_image
from rgft.tasks.tables import one_line
from rgft.tasks.task import TaskData

IMAGE, PLACE = "image", "place"  # of an example: its file, and the row that it is from


class ImageInputs:
    """Images as the model's image processor makes them: resized and normalized, not augmented.

    They are decoded when a batch needs them: as pixels, a data set may not fit into memory.

    Args:
        model: Folder, hub id or packaged name.
        side: Pixels a side that images are scaled to; None for the processor's own.

    Raises:
        InputError: The processor cannot be loaded, or does not scale images.
    """

    files = ("preprocessor_config.json",)
    multiple = 1
    evaluation_batch = EVALUATION_BATCH

    def __init__(self, model: str, side: int | None = None) -> None:
        self.processor: Any = load_image_processor(model, side)
        self._model = model
        if side is not None:
            self._check_scales(side)

    def load_model(self, labels: tuple[str, ...]) -> nn.Module:
        """The classifier with a new head, tried on an image.

        Raises:
            InputError: It cannot be loaded, or does not take what the processor makes.
        """
        loaded = load_image_classifier(self._model, labels)
        batch = self.blank(1)
        try:
            with torch.no_grad():
                loaded.eval()(**batch)
        except (ValueError, RuntimeError) as problem:
            shape = "x".join(map(str, batch["pixel_values"].shape[1:]))
            raise InputError(
                f"'{self._model}' does not take images of {shape} ({one_line(problem)}); give the "
                "size that it was made for with --image-size, or drop that option"
            ) from problem
        return loaded

    def examples(self, task: TaskData, split: str) -> list[Example]:
        """File, place and label of every row of a split."""
        rows = task.splits[split]
        images, labels = rows[task.input_columns[0]][:], rows[task.label_column][:]
        return [
            {IMAGE: image, PLACE: f"split {split!r}, row {row} of those in use", "labels": label}
            for row, (image, label) in enumerate(zip(images, labels, strict=True), start=1)
        ]

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        """1: all are of one size."""
        del example
        return (1,)

    def longest(self, examples: Sequence[Example]) -> Example:
        """Any of them."""
        return examples[0]

    def cut(self, example: Example, lengths: Sequence[int]) -> Example:
        """The example itself."""
        del lengths
        return example

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: "pixel_values" `[B, 3, H, W]` and what `labelled` adds."""
        pixels = self._pixels([decode_image(one[IMAGE], one[PLACE]) for one in examples])
        return labelled({"pixel_values": pixels}, examples)

    def blank(self, rows: int) -> dict[str, Tensor]:
        """A batch of black images of the first class."""
        pixels = self._pixels([Image.new("RGB", (64, 48))]).expand(rows, -1, -1, -1)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}

    def _check_scales(self, side: int) -> None:
        """Refuse a processor that goes its own way."""
        shape = self._pixels([Image.new("RGB", (side + 2, side + 1))]).shape[1:]
        if side not in shape[1:]:
            raise InputError(
                f"image_size is {side}, but the image processor of '{self._model}' makes images of "
                f"{'x'.join(map(str, shape))} whatever it is told; drop it, or give another model"
            )

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        try:
            pixels: Tensor = self.processor(list(images), return_tensors="pt")["pixel_values"]
        except ValueError as problem:
            raise InputError(
                f"the image processor of '{self._model}' cannot make a batch "
                f"({one_line(problem)}); give --image-size, or another model"
            ) from problem
        return pixels
