"""Forgetting: what a model could do by its pre-training, measured before and after fine-tuning.

A classifier of texts is asked how alike two sentences are, which it is never trained for here:
Spearman's rho between human ratings (STS-B, Cer et al. 2017) and the cosine of the sentences'
vectors, each the mean of the last hidden states over its tokens (Reimers and Gurevych 2019). Of a
decoder it is the perplexity of general text (WikiText-2, Merity et al. 2017), exp of the mean
negative log-likelihood of a token given those before it in its window.

Before is the model as it was loaded, with all its layers; after is the one that is saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgft import metrics
from rgft.batches import EVALUATION_BATCH
from rgft.errors import InputError
from rgft.inputs import Inputs
from rgft.models import is_encoder_decoder
from rgft.spec import RunSpec
from rgft.tasks import Modality, TaskData, load_task
from rgft.tasks.general_text import WIKITEXT, load_general_text
from rgft.text_to_text import IDS, DecoderInputs, TextToTextInputs

SIMILARITY = "stsb"
WINDOWS = 128  # of general text, unless fewer rows are asked for
Batch = Mapping[str, Tensor]


class Ability(Protocol):
    """Something that a model can do untaught."""

    @property
    def of(self) -> str:
        """What it is measured on."""
        ...

    @property
    def metric(self) -> str:
        """Either "spearman", of which more is better, or "perplexity", of which less is."""
        ...

    @property
    def rows(self) -> int:
        """Pairs of sentences, or windows of text."""
        ...

    def measure(self, model: nn.Module) -> float:
        """How well `model` does, in single precision and without dropout; its mode is kept."""
        ...


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike sentences are, by the cosine of mean hidden states.

    Attributes:
        pairs: Batches of first and second sentences, padded; each value `[B, L]`.
        ratings: How alike they are by people's judgement, [rows].
    """

    pairs: Sequence[tuple[Batch, Batch]]
    ratings: Sequence[float]
    of: str = SIMILARITY
    metric: str = "spearman"

    @property
    def rows(self) -> int:
        """Pairs of sentences."""
        return len(self.ratings)

    def measure(self, model: nn.Module) -> float:
        """Spearman's rho, in [-1, 1]; 0 where all vectors point the same way."""
        found: list[float] = []
        with _evaluating(model):
            for first, second in self.pairs:
                sides = mean_hidden(model, first), mean_hidden(model, second)
                found += F.cosine_similarity(*sides).tolist()
        return metrics.compute("regression", found, self.ratings)["spearman"]


@dataclass(frozen=True, slots=True)
class GeneralText:
    """Perplexity of windows of running text.

    Attributes:
        windows: Tokens, `[rows, L]` int64.
    """

    windows: Tensor
    of: str = WIKITEXT.name
    metric: str = "perplexity"

    @property
    def rows(self) -> int:
        """Windows."""
        return len(self.windows)

    def measure(self, model: nn.Module) -> float:
        """The exponential of the mean loss of a token; infinite beyond what a float holds."""
        total = 0.0
        with _evaluating(model):
            for tokens in self.windows:  # one by one: an output is a vocabulary at each position
                ids = tokens[None].to(_device(model))
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
        try:
            return math.exp(total / self.rows)
        except OverflowError:
            return math.inf


def check_forgetting(spec: RunSpec, modality: Modality) -> None:
    """Refuse models of which nothing is measured.

    Raises:
        InputError: It is one.
    """
    what = f"models of {modality}s" if modality != "text" else None
    if what is None and is_encoder_decoder(spec.model):
        what = "an encoder with a decoder"
    if what is not None:
        raise InputError(
            "forgetting is set, and is measured of encoders and decoders of texts, not of "
            f"{what}; drop it"
        )


def load_ability(spec: RunSpec, task: TaskData, inputs: Inputs) -> Ability:
    """What can be measured of the model that `spec` names.

    Raises:
        InputError: Nothing can, or the data for it is neither in a folder nor on the hub.
    """
    check_forgetting(spec, task.modality)
    most = spec.max_evaluation_rows
    if isinstance(inputs, TextToTextInputs):
        assert isinstance(inputs, DecoderInputs)
        return general_text(inputs, load_general_text(), min(most or WINDOWS, WINDOWS))
    return similarity(inputs.processor, spec.max_length, load_task(SIMILARITY), most)


def similarity(
    tokenizer: Any, max_length: int, task: TaskData, most: int | None = None
) -> Similarity:
    """The pairs of a regression task of two texts, from its test split, else its validation split.

    Args:
        tokenizer: The model's.
        max_length: Tokens that a sentence is cut at, if the model does not stop before.
        task: The task.
        most: Pairs at most, evenly over the split; None for all.
    """
    rows = task.splits.get("test", task.splits["validation"])
    rows = rows.select(evenly(len(rows), most or len(rows)))
    sides = [rows[column][:] for column in task.input_columns]
    order = sorted(range(len(rows)), key=lambda i: sum(len(side[i]) for side in sides))
    longest = min(max_length, tokenizer.model_max_length)

    def batch(texts: Sequence[str]) -> Batch:
        cut = {"truncation": True, "max_length": longest}
        return dict(tokenizer(texts, **cut, padding=True, return_tensors="pt"))

    pairs = []
    for start in range(0, len(order), EVALUATION_BATCH):
        first, second = ([side[i] for i in order[start:][:EVALUATION_BATCH]] for side in sides)
        pairs.append((batch(first), batch(second)))
    ratings = rows[task.label_column][:]
    return Similarity(pairs, [float(ratings[i]) for i in order])


def general_text(inputs: DecoderInputs, text: str, most: int) -> GeneralText:
    """Windows of `text`, as long as what the model reads and writes in this run.

    Args:
        inputs: Of the run.
        text: Running text.
        most: Windows at most, evenly over the text.

    Raises:
        InputError: The text fills no window.
    """
    length = inputs.writing.prompt + inputs.writing.answer
    tokens = torch.tensor(inputs.processor(text, add_special_tokens=False, verbose=False)[IDS])
    count = len(tokens) // length
    if count == 0:
        raise InputError(
            f"{WIKITEXT.name} has {len(tokens)} tokens here, less than the {length} of max_length "
            "and max_target_length together; put all of it there, or give less"
        )
    windows = tokens[: count * length].view(count, length)
    return GeneralText(windows[evenly(count, most)])


class Untaught(NamedTuple):
    """What a model could do before it was fine-tuned."""

    ability: Ability
    before: float

    def against(self, model: nn.Module) -> dict[str, Any]:
        """What a record says of it, and of the model as it is now."""
        return {
            "of": self.ability.of,
            "metric": self.ability.metric,
            "rows": self.ability.rows,
            "before": self.before,
            "after": self.ability.measure(model),
        }


def mean_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states, averaged over the tokens of each text: `[B, width]`."""
    given = {name: values.to(_device(model)) for name, values in batch.items()}
    states: Tensor = model(**given, output_hidden_states=True).hidden_states[-1].float()
    mask = given["attention_mask"].unsqueeze(-1).to(states)
    return (states * mask).sum(1) / mask.sum(1)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread.

    >>> evenly(9, 3), evenly(2, 3)
    ([0, 3, 6], [0, 1])
    """
    kept = min(count, most)
    return [i * count // kept for i in range(kept)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
