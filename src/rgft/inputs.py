"""How the samples of a task become batches, and which model takes them: texts or images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from rgft.batches import Example, TextInputs
from rgft.errors import InputError
from rgft.images import ImageInputs
from rgft.models import check_modality
from rgft.spec import MAX_LENGTH, RunSpec
from rgft.tasks import TaskData


class Inputs(Protocol):
    """What differs between texts and images.

    Attributes:
        processor: What makes the model's input and is saved beside it: a tokenizer, or an image
            processor.
        files: Names of the files that it is saved in.
        multiple: Lengths of batches are padded to a multiple of it.
    """

    processor: Any
    multiple: int

    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102 - said above

    def load_model(self, labels: tuple[str, ...]) -> nn.Module:
        """The model with a new head: an output for each label, or one value where there are none.

        Raises:
            InputError: It cannot be loaded, or does not take such samples.
        """
        ...

    def examples(self, task: TaskData, split: str) -> list[Example]:
        """The rows of a split, as `collate` takes them."""
        ...

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: what the model takes, with "labels" and, if given, "sample_ids"."""
        ...

    def length(self, example: Mapping[str, Any]) -> int:
        """Positions of a sample, of which its cost depends."""
        ...

    def cut(self, example: Example, length: int) -> Example:
        """The example with so many positions, if it has more."""
        ...


def load_inputs(spec: RunSpec, task: TaskData) -> Inputs:
    """What turns the task's samples into batches of the model that `spec` names.

    Raises:
        InputError: The model takes other samples, or an option is for others.
    """
    check_modality(spec.model, task.modality, task.name)
    if task.modality == "image":
        if spec.max_length != MAX_LENGTH:
            raise InputError(
                f"max_length is {spec.max_length}, but '{task.name}' is of images, which have no "
                "tokens; drop it (--image-size is what scales images)"
            )
        if spec.group_by_length:
            raise InputError(
                f"group_by_length is set, but '{task.name}' is of images, which have one size; "
                "drop it"
            )
        return ImageInputs(spec.model, spec.image_size)
    if spec.image_size is not None:
        raise InputError(f"image_size is {spec.image_size}, but '{task.name}' is of texts; drop it")
    return TextInputs(spec.model, spec.max_length)
