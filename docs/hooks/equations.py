"""Equations become MathML when the site is built, so that a page needs no script and no network to show them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex makes of ``$…$`` and of a fence of ``math``.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs' event: the page's HTML, with MathML in it."""
    return _EQUATION.sub(_as_mathml, html)


def _as_mathml(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    mathml = convert(unescape(latex).strip(), display="block" if bracket == "[" else "inline")
    if "<mi>&</mi>" in mathml or "<mi>\\" in mathml:  # the converter writes what it does not know as it is
        raise PluginError(f"equation {latex!r}: has something that latex2mathml does not know")
    return f'<{tag} class="arithmatex">{mathml}</{tag}>'
