"""Forgetting: what a model could do by its pre-training, measured before and after fine-tuning.

A classifier of texts is asked how alike two sentences are, which nothing taught it here:
Spearman's rho between human ratings (STS-B, Cer et al. 2017) and the cosine of the sentences'
vectors, each the mean of the last hidden states over its tokens (Reimers and Gurevych 2019). Of a
decoder it is the perplexity of general text (WikiText-2, Merity et al. 2017), exp of the mean
negative log-likelihood of a token given those before it in its window.

Before is the model as it was loaded, with all its layers; after is the one that is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from rgft.tasks.general_text import SPLIT, WIKITEXT, load_general_text
from rgft.text_to_text import IDS, TextToTextInputs
from rgft.writing import spread

SIMILARITY = "stsb"
WINDOWS = 128  # of general text at most

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Ability:
    """Something that a model can do untaught.

    Attributes:
        of: What it is measured on.
        split: Which part of that.
        rows: Pairs of sentences, or windows of text.
        tokens: That a sentence is cut at, or a window has.
        metric: "spearman", of which more is better, or "perplexity", of which less is.
        measure: How well a model does, in single precision and without dropout. Its mode is kept.
    """

    of: str
    split: str
    rows: int
    tokens: int
    metric: str
    measure: Callable[[nn.Module], float]


class Untaught(NamedTuple):
    """What a model could do before it was fine-tuned."""

    ability: Ability
    before: float

    def against(self, model: nn.Module) -> dict[str, Any]:
        """What a record says of it, and of the model as it is now."""
        known = {name: getattr(self.ability, name) for name in RECORDED}
        return {**known, "before": self.before, "after": self.ability.measure(model)}


RECORDED = ("of", "split", "rows", "tokens", "metric")


def check_forgetting(spec: RunSpec, modality: Modality) -> None:
    """Refuse runs of which nothing is measured.

    Raises:
        InputError: It is one.
    """
    if modality != "text" or is_encoder_decoder(spec.model):
        what = f"models of {modality}s" if modality != "text" else "an encoder with a decoder"
        raise InputError(
            "forgetting is set, and is measured of encoders and decoders of texts, not of "
            f"{what}; drop it"
        )
    if spec.task == SIMILARITY:
        raise InputError(
            f"forgetting is set, and is measured on {SIMILARITY}, which this run trains on; drop it"
        )


def load_ability(spec: RunSpec, task: TaskData, inputs: Inputs) -> Ability:
    """What can be measured of the model that `spec` names.

    Raises:
        InputError: Nothing can, or the data for it is neither in a folder nor on the hub.
    """
    check_forgetting(spec, task.modality)
    try:
        if isinstance(inputs, TextToTextInputs):
            return general_text(inputs, load_general_text())
        return similarity(inputs.processor, spec.max_length, load_task(SIMILARITY))
    except InputError as error:
        raise InputError(f"what --forgetting measures on: {error}") from error


def similarity(tokenizer: Any, max_length: int, task: TaskData) -> Ability:
    """How alike sentences are, by the cosine of their vectors.

    Spearman's rho is in [-1, 1]; it is 0 where all vectors point the same way.

    Args:
        tokenizer: The model's.
        max_length: Tokens that a sentence is cut at, if the model does not stop before.
        task: Pairs of texts with ratings; its test split, or the validation split where there is
            none (GLUE's has no ratings).
    """
    split = "test" if "test" in task.splits else "validation"
    rows = task.splits[split]
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
    given = rows[task.label_column][:]
    ratings = [float(given[i]) for i in order]

    def measure(model: nn.Module) -> float:
        found: list[float] = []
        with _evaluating(model):
            for one, other in pairs:
                vectors = mean_hidden(model, one), mean_hidden(model, other)
                found += F.cosine_similarity(*vectors).tolist()
        return metrics.compute("regression", found, ratings)["spearman"]

    return Ability(SIMILARITY, split, len(ratings), longest, "spearman", measure)


def general_text(inputs: TextToTextInputs, text: str) -> Ability:
    """The perplexity of windows of `text`, as long as what the model reads and writes in this run.

    At most `WINDOWS` of them, evenly over the text. It is infinite beyond what a float holds.

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
    windows = spread(list(tokens[: count * length].view(count, length)), WINDOWS)

    def measure(model: nn.Module) -> float:
        total = 0.0
        with _evaluating(model):
            for window in windows:  # one by one: the output is a vocabulary at each position
                ids = window[None].to(_device(model))
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
        try:
            return math.exp(total / len(windows))
        except OverflowError:
            return math.inf

    return Ability(WIKITEXT.name, SPLIT, len(windows), length, "perplexity", measure)


def mean_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states, averaged over the tokens of each text: `[B, width]`."""
    given = {name: values.to(_device(model)) for name, values in batch.items()}
    states: Tensor = model(**given, output_hidden_states=True).hidden_states[-1].float()
    mask = given["attention_mask"].unsqueeze(-1).to(states)
    return (states * mask).sum(1) / mask.sum(1)


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
