"""Prompts, and the texts to write for them, to token batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.batches import CHUNK, Example
from rgft.errors import InputError, warn
from rgft.models import Architecture, load_tokenizer, load_writer
from rgft.progress import bar
from rgft.residuals import SAMPLE_IDS
from rgft.sample_losses import IGNORED
from rgft.tasks.prompts import check_prompt, ending, render
from rgft.tasks.task import TaskData

MULTIPLE = 8  # lengths are padded to it: there are two of them, and each pair has to be priced
EVALUATION_BATCH = 8  # a row has an output for each word of the vocabulary at each position
IDS, LABELS = "input_ids", "labels"
ROW, PROMPT, REFERENCES = "row", "prompt", "references"  # of what is evaluated


@dataclass(frozen=True, slots=True)
class Writing:
    """How much is read and learned, and how texts are written.

    Attributes:
        prompt: Tokens that what is read is cut at.
        answer: Tokens that what is learned is cut at; and as many are written at most.
        beams: Width of the search that writes; 1 takes the most probable token each time.
        rows: Most rows of a split for which texts are written.
    """

    prompt: int
    answer: int
    beams: int
    rows: int


class TextToTextInputs(ABC):
    """Prompts and answers as the model's tokenizer makes them.

    Args:
        model: Folder, hub id or packaged name.
        prompt: What it reads, with columns in braces.
        writing: Lengths of texts, and how they are written.

    Attributes:
        losses: Kind of the model's loss, as `rgft.sample_losses` names it.
        writing: As given.

    Raises:
        InputError: The tokenizer cannot be loaded, or has no token that ends a text.
    """

    architecture: Architecture
    losses: str
    multiple = MULTIPLE
    evaluation_batch = EVALUATION_BATCH

    def __init__(self, model: str, prompt: str, writing: Writing) -> None:
        self.processor: Any = load_tokenizer(model)
        self.writing = writing
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
        name, positions = self._positions()
        if isinstance(most, int) and positions > most:
            raise InputError(
                f"{name} {positions}, but '{self._model}' takes {most} tokens; give less"
            )
        return loaded

    def examples(self, task: TaskData, split: str) -> list[Example]:
        """Tokens of prompt and answer of every row; beside them texts, but for those of "train".

        Rows are in their order in "train", and from short to long elsewhere.
        """
        columns, data = task.input_columns, task.splits[split]
        check_prompt(self._prompt, columns)
        rows = list(zip(*(data[column][:] for column in columns), strict=True))
        references = data[task.label_column][:]
        prompts: list[str] = []
        pairs: list[tuple[list[int], list[int]]] = []
        with bar(f"tokenizing {split}", len(rows), "row", delay=1) as shown:
            for start in range(0, len(rows), CHUNK):
                texts = [
                    render(self._prompt, dict(zip(columns, row, strict=True)))
                    for row in rows[start : start + CHUNK]
                ]
                prompts += texts if split != "train" else ()
                pairs += self._encoded(texts, [r[0] for r in references[start : start + CHUNK]])
                shown.update(len(texts))
        examples = [self._joined(read, answer[: self.writing.answer]) for read, answer in pairs]
        if split == "train":
            self._warn_of_cut_answers([len(answer) for _, answer in pairs])
            return examples
        for i, (example, texts) in enumerate(zip(examples, references, strict=True)):
            example |= {ROW: i, PROMPT: prompts[i], REFERENCES: list(texts)}
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
    def _encoded(
        self, prompts: Sequence[str], answers: Sequence[str]
    ) -> Iterable[tuple[list[int], list[int]]]:
        """Tokens of prompts, cut, and of answers, whole."""

    @abstractmethod
    def _joined(self, read: list[int], answer: list[int]) -> Example:
        """A sample of tokens to read and tokens to learn."""

    @abstractmethod
    def _positions(self) -> tuple[str, int]:
        """The most positions that a model has to know, and words that go before the number."""

    def _padded(self, rows: Sequence[Sequence[int]], multiple: int = 1) -> dict[str, Tensor]:
        return {
            IDS: _rectangle(rows, self.processor.pad_token_id, multiple),
            "attention_mask": _rectangle([[1] * len(row) for row in rows], 0, multiple),
        }

    def _warn_of_cut_answers(self, lengths: Sequence[int]) -> None:
        """Answers that are cut have no end to learn."""
        cut = sum(length > self.writing.answer for length in lengths)
        if cut:
            warn(
                f"{cut} of {len(lengths)} answers to learn are cut at {self.writing.answer} tokens "
                "and lose their end; --max-target-length is for that"
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

    def _encoded(
        self, prompts: Sequence[str], answers: Sequence[str]
    ) -> Iterable[tuple[list[int], list[int]]]:
        end = self.processor.eos_token_id
        # spaces around a text mean nothing to an encoder, and not all tokenizers drop them
        read = self.processor(
            [prompt.strip() for prompt in prompts],
            truncation=True,
            max_length=self.writing.prompt,
        )[IDS]
        learned = self.processor(text_target=list(answers))[IDS]
        # some tokenizers end no text, and a model would not learn to stop
        return zip(read, (a if end in a else [*a, end] for a in learned), strict=True)

    def _joined(self, read: list[int], answer: list[int]) -> Example:
        return {IDS: read, LABELS: answer}

    def _positions(self) -> tuple[str, int]:
        longer = max(self.writing.prompt, self.writing.answer)
        return "the larger of max_length and max_target_length is", longer


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

    def _encoded(
        self, prompts: Sequence[str], answers: Sequence[str]
    ) -> Iterable[tuple[list[int], list[int]]]:
        end = self.processor.eos_token_id
        cue = len(self.processor(ending(self._prompt), add_special_tokens=False)[IDS])
        read = [self._shortened(ids, cue) for ids in self.processor(list(prompts))[IDS]]
        learned = self.processor(list(answers), add_special_tokens=False)[IDS]
        return zip(read, ([*answer, end] for answer in learned), strict=True)

    def _joined(self, read: list[int], answer: list[int]) -> Example:
        return {IDS: [*read, *answer], LABELS: [*[IGNORED] * len(read), *answer]}

    def _shortened(self, ids: list[int], cue: int) -> list[int]:
        """A prompt without what is too much before its cue, the text behind its last column."""
        if ids[-1] == self.processor.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text
        if len(ids) <= self.writing.prompt:
            return ids
        cue = min(cue, self.writing.prompt // 2)
        return ids[: self.writing.prompt - cue] + ids[len(ids) - cue :]

    def _positions(self) -> tuple[str, int]:
        both = self.writing.prompt + self.writing.answer
        return "max_length and max_target_length are together", both


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
