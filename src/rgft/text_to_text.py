"""Prompts, and the texts to write for them, to token batches."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.batches import CHUNK, Example
from rgft.errors import InputError
from rgft.models import Architecture, load_tokenizer, load_writer
from rgft.progress import bar
from rgft.residuals import SAMPLE_IDS
from rgft.sample_losses import IGNORED
from rgft.tasks.prompts import check_prompt, ending, render
from rgft.tasks.task import TaskData

MULTIPLE = 8  # lengths are padded to it: there are two of them, and each pair has to be priced
EVALUATION_BATCH = 8  # a row has an output for each word of the vocabulary at each position
IDS, LABELS, REFERENCES = "input_ids", "labels", "references"


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens that texts are cut at.

    Attributes:
        prompt: Of what is read.
        answer: Of what is learned; and as many are written at most.
    """

    prompt: int
    answer: int


class TextToTextInputs(ABC):
    """Prompts and answers as the model's tokenizer makes them.

    Args:
        model: Folder, hub id or packaged name.
        prompt: What it reads, with columns in braces.
        limits: Tokens that texts are cut at.

    Attributes:
        losses: Kind of the model's loss, as `rgft.sample_losses` names it.
        limits: Tokens that texts are cut at.

    Raises:
        InputError: The tokenizer cannot be loaded, or has no token that ends a text.
    """

    architecture: Architecture
    losses: str
    multiple = MULTIPLE
    evaluation_batch = EVALUATION_BATCH

    def __init__(self, model: str, prompt: str, limits: Limits) -> None:
        self.processor: Any = load_tokenizer(model)
        self.limits = limits
        self._model, self._prompt = model, prompt
        if self.processor.eos_token_id is None:
            raise InputError(
                f"the tokenizer of '{model}' has no token that ends a text, so that a model cannot "
                "learn when to stop; give another --model"
            )

    @property
    def files(self) -> tuple[str, ...]:
        """Of the vocabulary."""
        return tuple(self.processor.vocab_files_names.values())

    def load_model(self, labels: tuple[str, ...]) -> nn.Module:
        """The model with the head that it was pre-trained with.

        Raises:
            InputError: It cannot be loaded, or does not take so many tokens.
        """
        del labels
        loaded = load_writer(self._model, self.architecture)
        most = getattr(loaded.config, "max_position_embeddings", None)
        if isinstance(most, int) and self._positions() > most:
            raise InputError(
                f"max_length is {self.limits.prompt} and max_target_length {self.limits.answer}: "
                f"that is more than the {most} tokens that '{self._model}' takes; give less"
            )
        return loaded

    def examples(self, task: TaskData, split: str) -> list[Example]:
        """Tokens of prompt and answer of every row; all references, but for those of "train".

        Rows are in their order in "train", and from short to long elsewhere.
        """
        columns, data = task.input_columns, task.splits[split]
        check_prompt(self._prompt, columns)
        rows = list(zip(*(data[column][:] for column in columns), strict=True))
        references = data[task.label_column][:]
        examples: list[Example] = []
        with bar(f"tokenizing {split}", len(rows), "row", delay=1) as shown:
            for start in range(0, len(rows), CHUNK):
                texts = [
                    render(self._prompt, dict(zip(columns, row, strict=True)))
                    for row in rows[start : start + CHUNK]
                ]
                examples += self._encoded(texts, [r[0] for r in references[start : start + CHUNK]])
                shown.update(len(texts))
        if split == "train":
            self._warn_of_cut_answers(examples)
            return examples
        for example, texts in zip(examples, references, strict=True):
            example[REFERENCES] = list(texts)
        return sorted(examples, key=lambda example: sum(self.lengths(example)))

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: tokens, mask `[B, L]`; labels `[B, L']`, -100 where there is none; any ids."""
        batch = self._padded([example[IDS] for example in examples], MULTIPLE)
        batch[LABELS] = _rectangle([e[LABELS] for e in examples], IGNORED, MULTIPLE)
        if SAMPLE_IDS in examples[0]:
            batch[SAMPLE_IDS] = torch.tensor([example[SAMPLE_IDS] for example in examples])
        return batch

    @abstractmethod
    def lengths(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens that are read, and apart from them those that are written."""

    def longest(self, examples: Sequence[Example]) -> Example:
        """An example that is as long as the longest, on each side."""
        return {
            name: max((example[name] for example in examples), key=len) for name in (IDS, LABELS)
        }

    def cut(self, example: Example, lengths: Sequence[int]) -> Example:
        """Its first tokens, on each side."""
        return {IDS: example[IDS][: lengths[0]], LABELS: example[LABELS][: lengths[-1]]}

    @abstractmethod
    def questions(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch without answers, for the model to write them."""

    @abstractmethod
    def written(self, tokens: Tensor, questions: Mapping[str, Tensor]) -> list[str]:
        """The texts that a model has written for `questions`."""

    @abstractmethod
    def _encoded(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
        """Tokens of prompts and answers."""

    @abstractmethod
    def _positions(self) -> int:
        """The most positions that a model has to know."""

    def _padded(self, rows: Sequence[Sequence[int]], multiple: int = 1) -> dict[str, Tensor]:
        return {
            IDS: _rectangle(rows, self.processor.pad_token_id, multiple),
            "attention_mask": _rectangle([[1] * len(row) for row in rows], 0, multiple),
        }

    def _warn_of_cut_answers(self, examples: Sequence[Example]) -> None:
        """Answers that are cut have no end to learn."""
        end = self.processor.eos_token_id
        cut = sum(example[LABELS][-1] != end for example in examples)
        if cut:
            warnings.warn(
                f"{cut} of {len(examples)} answers to learn are cut at {self.limits.answer} tokens "
                "and lose their end; --max-target-length is for that",
                RuntimeWarning,
                stacklevel=2,
            )


class EncoderDecoderInputs(TextToTextInputs):
    """For models whose encoder reads the prompt and whose decoder writes the answer (T5, BART)."""

    architecture = "encoder-decoder"
    losses = "classification"

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens of the prompt, and of the answer."""
        return len(example[IDS]), len(example[LABELS])

    def questions(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The prompts, padded behind."""
        return self._padded([example[IDS] for example in examples])

    def written(self, tokens: Tensor, questions: Mapping[str, Tensor]) -> list[str]:
        """What the decoder has written."""
        del questions
        return _decoded(self.processor, tokens)

    def _encoded(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
        # spaces around a text mean nothing to an encoder, and not all tokenizers drop them
        read = self.processor(
            [prompt.strip() for prompt in prompts],
            truncation=True,
            max_length=min(self.limits.prompt, self.processor.model_max_length),
        )[IDS]
        learned = self.processor(text_target=list(answers))[IDS]
        return [
            {IDS: ids, LABELS: labels[: self.limits.answer]}
            for ids, labels in zip(read, learned, strict=True)
        ]

    def _positions(self) -> int:
        return max(self.limits.prompt, self.limits.answer)


class DecoderInputs(TextToTextInputs):
    """For models that write on where the prompt ends (Llama, Gemma, GPT-2)."""

    architecture = "decoder"
    losses = "causal-lm"

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens of both together."""
        return (len(example[IDS]),)

    def questions(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The prompts, padded in front: writing goes on behind them."""
        prompts = [
            [i for i, label in zip(example[IDS], example[LABELS], strict=True) if label == IGNORED]
            for example in examples
        ]
        turned = self._padded([prompt[::-1] for prompt in prompts])
        return {name: values.flip(1) for name, values in turned.items()}

    def written(self, tokens: Tensor, questions: Mapping[str, Tensor]) -> list[str]:
        """What stands behind the prompts."""
        return _decoded(self.processor, tokens[:, questions[IDS].shape[1] :])

    def _encoded(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
        end = self.processor.eos_token_id
        cue = len(self.processor(ending(self._prompt), add_special_tokens=False)[IDS])
        read = [self._shortened(ids, cue) for ids in self.processor(list(prompts))[IDS]]
        learned = self.processor(list(answers), add_special_tokens=False)[IDS]
        examples = []
        for ids, answer in zip(read, learned, strict=True):
            labels = [*answer, end][: self.limits.answer]
            examples.append({IDS: [*ids, *labels], LABELS: [*[IGNORED] * len(ids), *labels]})
        return examples

    def _shortened(self, ids: list[int], cue: int) -> list[int]:
        """A prompt without what is too much before its cue, the text behind its last column."""
        if ids[-1] == self.processor.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text
        if len(ids) <= self.limits.prompt:
            return ids
        cue = min(cue, self.limits.prompt // 2)
        return ids[: self.limits.prompt - cue] + ids[len(ids) - cue :]

    def _positions(self) -> int:
        return self.limits.prompt + self.limits.answer


INPUTS: Mapping[Architecture, type[TextToTextInputs]] = {
    "encoder-decoder": EncoderDecoderInputs,
    "decoder": DecoderInputs,
}


def _rectangle(rows: Sequence[Sequence[int]], value: int, multiple: int) -> Tensor:
    """Rows filled up behind with `value`, to the longest, rounded up."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _decoded(tokenizer: Any, tokens: Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]
