"""Every method by name, one table per family."""

from __future__ import annotations

from rgft.errors import unknown
from rgft.methods.adapted import ADAPTED
from rgft.methods.controls import CONTROLS
from rgft.methods.guided import GUIDED
from rgft.methods.method import ADAM_BETA2, Method, Recipe, Surveyed
from rgft.methods.published import PUBLISHED

__all__ = ["ADAM_BETA2", "METHODS", "Method", "Recipe", "Surveyed", "find_method"]

METHODS: dict[str, Method] = {**GUIDED, **CONTROLS, **PUBLISHED, **ADAPTED}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: Unknown name.

    >>> find_method("full").config.policy
    'uniform'
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
