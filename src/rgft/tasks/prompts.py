"""What a model that writes texts is asked: a template with the columns of a row in braces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rgft.errors import InputError

_COLUMN = re.compile(r"\{([^{}]*)\}")


def default_prompt(columns: Sequence[str]) -> str:
    r"""The texts below each other, and a line break behind them, where the answer begins.

    >>> default_prompt(["title", "text"])
    '{title}\n{text}\n'
    """
    return "".join(f"{{{column}}}\n" for column in columns)


def check_prompt(prompt: str, columns: Sequence[str]) -> str:
    """The prompt, if it has columns and all of them are known.

    Raises:
        InputError: It has none, or one that is not among `columns`.
    """
    named = _COLUMN.findall(prompt)
    wrong = [name for name in named if name not in columns]
    if not named or wrong:
        known = ", ".join(f"{{{column}}}" for column in columns)
        problem = f"{{{wrong[0]}}}, which is no text column" if wrong else "no column in braces"
        raise InputError(f"the prompt {prompt!r} has {problem}; allowed: {known}")
    return prompt


def render(prompt: str, row: Mapping[str, str]) -> str:
    """The prompt with the row's texts.

    >>> render("Q: {question} A:", {"question": "1 + {x}?"})
    'Q: 1 + {x}? A:'
    """
    return _COLUMN.sub(lambda match: row[match.group(1)], prompt)


def ending(prompt: str) -> str:
    """What stands behind the last column.

    >>> ending("Q: {question} A:")
    ' A:'
    """
    return _COLUMN.split(prompt)[-1]
