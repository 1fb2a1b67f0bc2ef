"""HTML from values: text is escaped unless it is markup already, so that no name in a file can become an element."""

from __future__ import annotations

import html
import unicodedata

VOID = {"meta", "wbr"}
"""The elements used here that have no end tag."""


class Markup(str):
    """Text that is HTML already; only `element`, `escaped` and `joined` make it from text that is not."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """`text` as HTML. Characters that no HTML file may hold, or that reorder what stands around them, become U+FFFD."""
    if isinstance(text, Markup):
        return text
    if not text.isprintable():
        text = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c).startswith("C") else c for c in text)
    return Markup(html.escape(text))


def element(name: str, /, *children: str, **attributes: str | int | None) -> Markup:
    """An element with its children and attributes.

    Attributes are named as keywords allow: ``class_`` is "class" and ``aria_label`` "aria-label". One that is None is
    left out.
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = "".join([name, *(f' {key}="{escaped(str(value))}"' for key, value in named.items())])
    return Markup(f"<{start}>" if name in VOID else f"<{start}>{joined(*children)}</{name}>")


def joined(*parts: str) -> Markup:
    """The parts one after another."""
    return Markup("".join(map(escaped, parts)))


def breakable(name: str) -> Markup:
    """A layer's name, which may be broken after its dots, and whose letters do not reorder the text around it."""
    first, *others = name.split(".")
    return element("bdi", first, *(part for other in others for part in (".", element("wbr"), other)))
