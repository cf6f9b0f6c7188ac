"""What written texts are worth: ROUGE against references, and exact match of final answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

ROUGE = ("rouge1", "rouge2", "rougeL")
_CUE = re.compile(r"the (?:final )?answer is:?|####", re.IGNORECASE)
_BEFORE = re.compile(r"^(?:[ !?$%]|\.(?!\d))+")  # amounts and percentages count as plain numbers
_BEHIND = " .!?$%"
# bounded, since models write what would take hours to work out, such as 1e999999999
_NUMBER = re.compile(
    r"[-+]?(?:\d{1,30}/\d{1,30}|(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:e[-+]?\d{1,2})?)",
    re.IGNORECASE,
)

Texts = Sequence[str]


def rouge(written: Texts, references: Sequence[Texts]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), with Porter's stemmer.

    Of several references of a text the best counts, for each of the three. The package that counts
    knows words of Latin letters and digits alone.

    Args:
        written: Texts of a model.
        references: For each of them, at least one text that answers.

    >>> scores = rouge(["the cat sat"], [["a cat", "the cats sat down"]])
    >>> {name: round(score, 3) for name, score in scores.items()}
    {'rouge1': 0.857, 'rouge2': 0.8, 'rougeL': 0.857}
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - seconds to import

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    totals = dict.fromkeys(ROUGE, 0.0)
    for text, answers in zip(written, references, strict=True):
        for name, score in scorer.score_multi(answers, text).items():
            totals[name] += score.fmeasure
    return {name: total / len(written) for name, total in totals.items()}


def exact_match(written: Texts, references: Sequence[Texts]) -> dict[str, float]:
    """Share of the texts whose final answer is that of a reference; see `same_answer`.

    >>> exact_match(["It is 2.", "2 + 1 = 3 #### 3"], [["#### 2"], ["The answer is: 3.0"]])
    {'exact_match': 0.5}
    """
    right = [
        any(same_answer(text, answer) for answer in answers)
        for text, answers in zip(written, references, strict=True)
    ]
    return {"exact_match": sum(right) / len(right)}


def same_answer(written: str, reference: str) -> bool:
    """Whether a text ends in the answer that a reference ends in.

    Numbers are the same if their values are, other answers if their letters are. A reference
    without a final answer is one as a whole.

    >>> same_answer("So the answer is: $1,000.", "#### 1000"), same_answer("1000", "#### 1000")
    (True, False)
    """
    wanted = final_answer(reference)
    if wanted is None:
        return written.strip() == reference.strip()
    found = final_answer(written)
    return found is not None and _value(found) == _value(wanted)


def final_answer(text: str) -> str | None:
    r"""What stands behind the last "The answer is" or "####", on the same line; None without it.

    >>> final_answer("1/2 + 1/2 = 1\nThe final answer is: 1.\nQuestion: 2")
    '1'
    """
    behind = _CUE.split(text)
    if len(behind) < 2:
        return None
    line = behind[-1].strip(" ").split("\n", 1)[0]
    return _BEFORE.sub("", line).rstrip(_BEHIND)


def commonest_answer(references: Sequence[Texts]) -> float:
    """Exact match of the best answer that ignores its question.

    >>> commonest_answer([["#### 2"], ["#### 3"], ["#### 2.0"], ["#### 4"]])
    0.5
    """
    answers = Counter(_value(final_answer(texts[0]) or texts[0]) for texts in references)
    return max(answers.values()) / len(references)


def _value(text: str) -> Fraction | str:
    """The value of a number or a fraction of some 30 digits; else the text."""
    plain = text.replace(",", "")
    if _NUMBER.fullmatch(plain) is None:
        return text
    try:
        return Fraction(plain)
    except ZeroDivisionError:
        return text


JUDGES: dict[str, Callable[[Texts, Sequence[Texts]], dict[str, float]]] = {
    **dict.fromkeys(ROUGE, rouge),
    "exact_match": exact_match,
}
"""By headline metric."""
