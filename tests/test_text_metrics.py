"""ROUGE and exact match against counts by hand."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

import hub_rows
from rgft.budgeting import task_yardstick
from rgft.stages import worth_going_on
from rgft.tasks.hub import from_tables
from rgft.tasks.mathematics import GSM8K
from rgft.tasks.tables import Table
from rgft.text_metrics import commonest_answer, exact_match, final_answer, rouge, same_answer

WORDS = ("cat", "dog", "sun", "hat", "red")  # which the stemmer leaves alone


def f1(common: int, written: int, reference: int) -> float:
    return 2 * common / (written + reference)


def longest_common(left: list[str], right: list[str]) -> int:
    """By trying all subsequences."""
    for size in range(len(left), 0, -1):
        for kept in itertools.combinations(left, size):
            rest = iter(right)
            if all(word in rest for word in kept):
                return size
    return 0


def test_rouge_is_the_overlap_of_words_pairs_and_subsequences() -> None:
    rng = random.Random(0)
    texts = [[rng.choices(WORDS, k=rng.randint(2, 7)) for _ in range(2)] for _ in range(30)]
    found = rouge([" ".join(w) for w, _ in texts], [[" ".join(r)] for _, r in texts])
    wanted = dict.fromkeys(found, 0.0)
    for written, reference in texts:
        for name, size in (("rouge1", 1), ("rouge2", 2)):
            grams = [
                Counter(zip(*(text[i:] for i in range(size)), strict=False))
                for text in (written, reference)
            ]
            common = sum((grams[0] & grams[1]).values())
            wanted[name] += f1(common, *(grams[i].total() for i in (0, 1))) / len(texts)
        common = longest_common(written, reference)
        wanted["rougeL"] += f1(common, len(written), len(reference)) / len(texts)
    assert found == pytest.approx(wanted)


def test_the_best_reference_counts_for_each_measure() -> None:
    several = rouge(["cat dog sun"], [["dog cat hat", "sun", "red hat"]])
    alone = [rouge(["cat dog sun"], [[r]]) for r in ("dog cat hat", "sun", "red hat")]
    assert several == {name: max(scores[name] for scores in alone) for name in several}


ANSWERS = [
    ("#### 18", "18"),
    ("9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
    ("so it is $\\boxed{3}$. The answer is: 3", "3"),
    ("The final answer is 50%.", "50"),
    ("The answer is: 1\nQuestion: and then?\nThe answer is: 2", "2"),
    ("The answer is $1,080.00!\n\nmore", "1,080.00"),
    ("#### .5", ".5"),
    ("The answer is $.50.", ".50"),
    ("The answer is... 5", "5"),
    ("18", None),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_the_final_answer_is_behind_the_last_cue(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


SAME = [
    ("The answer is: 1080", "#### 1,080", True),
    ("#### 0.5", "The answer is: 1/2", True),
    ("#### .5", "#### 0.5", True),
    ("#### .5", "#### 5", False),
    ("#### +5.", "#### 5", True),
    ("#### 1e3", "#### 1000", True),
    ("#### 1E-2", "#### 0.01", True),
    ("#### 1e999999999", "#### 1e999999998", False),  # as texts: no memory holds the numbers
    ("#### 1e999999999", "#### 1e999999999", True),
    ("#### " + "9" * 99, "#### " + "9" * 99 + ".0", False),
    ("#### x^2 + 1", "The answer is: x^2 + 1", True),
    ("#### 1/0", "#### 1/0", True),
    ("#### 1/0", "#### 0", False),
    ("#### ", "#### 0", False),
    ("18", "#### 18", False),
    ("it is 17 #### 18", "#### 17", False),
    (" as it is ", "as it is", True),
]


@pytest.mark.parametrize(("written", "reference", "same"), SAME)
def test_numbers_are_the_same_by_value(written: str, reference: str, same: bool) -> None:
    assert same_answer(written, reference) is same
    assert exact_match([written], [["#### nothing", reference]]) == {"exact_match": float(same)}


def test_stages_of_a_run_are_judged_against_the_commonest_answer() -> None:
    rows = hub_rows.rows("gsm8k", 70)
    table = Table("rows", {name: rows[name][:] for name in rows.column_names})
    task = from_tables(GSM8K, {"train": table, "validation": table}, "rows")
    yardstick = task_yardstick(task, rows=50)
    assert (yardstick.metric, yardstick.rows) == ("exact_match", 50)
    assert yardstick.chance == pytest.approx(1 / 7)
    assert commonest_answer(task.splits["validation"]["answer"]) == yardstick.chance
    assert worth_going_on([0.14, 0.15], yardstick)  # at chance
    assert not worth_going_on([0.4, 0.8, 0.81], yardstick)
