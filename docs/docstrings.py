"""Turns what docstrings hold besides Google's sections into Markdown: doctests and TeX."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^(?P<indent>[ ]*)>>> .*(?:\n(?P=indent)\S.*)*", re.MULTILINE)
# rendering TeX would take a script from elsewhere: it is shown as code
INLINE = re.compile(r":math:`([^`]*)`")
DISPLAYED = re.compile(r"^(?P<indent>[ ]*)\.\. math:: (?P<tex>.*)$", re.MULTILINE)


def markdown(docstring: str) -> str:
    """The docstring with doctests and formulas as code."""
    docstring = DOCTEST.sub(r"\g<indent>```pycon\n\g<0>\n\g<indent>```", docstring)
    docstring = DISPLAYED.sub(r"\g<indent>```tex\n\g<indent>\g<tex>\n\g<indent>```", docstring)
    return INLINE.sub(r"`\1`", docstring)


class PlainDocstrings(griffe.Extension):
    """Applies `markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with each object that has been read."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
