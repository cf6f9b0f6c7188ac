"""How the samples of a task become batches, and which model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from rgft.batches import Example, TextInputs
from rgft.errors import InputError
from rgft.images import ImageInputs
from rgft.models import check_modality, writes_as
from rgft.spec import BEAMS, MAX_LENGTH, MAX_TARGET_LENGTH, WRITTEN_ROWS, RunSpec
from rgft.tasks import TaskData
from rgft.tasks.prompts import default_prompt
from rgft.text_metrics import JUDGES
from rgft.text_to_text import INPUTS, TextToTextInputs, Writing

ASKED = ("prompt", "max_target_length", "beams", "written_rows")  # of texts to write alone


class Inputs(Protocol):
    """What differs between labelled texts, labelled images, and texts that are to be written.

    Attributes:
        processor: What makes the model's input and is saved beside it: a tokenizer, or an image
            processor.
        files: Names of the files that it is saved in.
        multiple: Lengths of batches are padded to a multiple of it.
        evaluation_batch: Rows of a batch that is evaluated.
    """

    processor: Any
    multiple: int
    evaluation_batch: int

    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102 - said above

    def load_model(self, labels: tuple[str, ...]) -> nn.Module:
        """The model, with a new head: an output for each label, or one value where there are none.

        What writes texts has a head.

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

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        """Positions of a sample, on which its cost depends: of each of its sides, if it has two."""
        ...

    def longest(self, examples: Sequence[Example]) -> Example:
        """An example with as many positions as any of them has, on each side."""
        ...

    def cut(self, example: Example, lengths: Sequence[int]) -> Example:
        """The example with so many positions on each side, if it has more."""
        ...


def load_inputs(spec: RunSpec, task: TaskData) -> Inputs:
    """What turns the task's samples into batches of the model that `spec` names.

    Raises:
        InputError: The model takes other samples, or an option is for others.
    """
    if task.kind == "generation":
        return _text_to_text(spec, task)
    for option in ASKED:
        given = getattr(spec, option)
        if given is not None:
            raise InputError(
                f"{option} is {given!r}, but '{task.name}' has labels and no texts to write; drop "
                "it (a task of your own has them with --target-column)"
            )
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
    _refuse_image_size(spec, task)
    return TextInputs(spec.model, spec.max_length)


def _text_to_text(spec: RunSpec, task: TaskData) -> TextToTextInputs:
    _refuse_image_size(spec, task)
    if task.metric not in JUDGES:
        raise InputError(
            f"the metric of '{task.name}' is {task.metric!r}; allowed for texts to write: "
            f"{', '.join(JUDGES)}"
        )
    prompt = task.prompt if spec.prompt is None else spec.prompt
    kind = INPUTS[writes_as(spec.model, task.name)]
    writing = Writing(
        spec.max_length,
        answer=spec.max_target_length or MAX_TARGET_LENGTH,
        beams=spec.beams or BEAMS,
        rows=spec.written_rows or WRITTEN_ROWS,
    )
    return kind(
        spec.model, default_prompt(task.input_columns) if prompt is None else prompt, writing
    )


def _refuse_image_size(spec: RunSpec, task: TaskData) -> None:
    if spec.image_size is not None:
        raise InputError(f"image_size is {spec.image_size}, but '{task.name}' is of texts; drop it")
