"""Docstrings end a line before code with two colons, as reStructuredText does; Markdown has one, or none."""

from __future__ import annotations

import re
from typing import Any

import griffe

_BEFORE_CODE = re.compile(r" ::$|(?<=\w):(?=:$)", re.MULTILINE)


class ColonsBeforeCode(griffe.Extension):
    """For mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe's event: an object has been read."""
        if obj.docstring:
            obj.docstring.value = _BEFORE_CODE.sub("", obj.docstring.value)
