"""Blocks of Markdown documents that a program writes: between ``<!-- table: NAME -->`` and ``<!-- /table -->``.

Each marker is a line of its own, so a document can speak of markers within a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_OPENING = re.compile(r"<!-- table: ([a-z0-9]+(?:-[a-z0-9]+)*) -->")
_CLOSING = "<!-- /table -->"
_MARKER_LIKE = re.compile(r"\s*<!--\s*/?\s*table\b")


class BlockError(ValueError):
    """A document's markers do not make blocks. The message begins with the file and the line."""


@dataclass(frozen=True)
class Block:
    """One block. first, last: the numbers, from 1, of the lines of its two markers."""

    name: str
    first: int
    last: int


def documents(root: Path) -> list[Path]:
    """README.md and every Markdown file under docs, in the order of their paths."""
    readme = root / "README.md"
    return [*([readme] if readme.exists() else []), *sorted((root / "docs").rglob("*.md"))]


def find(text: str, label: str) -> list[Block]:
    """The blocks of a document, in their order; `label` names it in errors.

    Raises:
        BlockError: a marker is misspelt or has something beside it, a block has no end, or begins within another.
    """
    blocks: list[Block] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        opening = _OPENING.fullmatch(line)
        if opening is None and line != _CLOSING:
            if _MARKER_LIKE.match(line):
                expected = f"'<!-- table: name -->' or '{_CLOSING}' alone on its line"
                raise BlockError(f"{label}:{number}: got {line!r}, expected {expected}")
        elif opening is not None:
            if opened is not None:
                raise BlockError(
                    f"{label}:{number}: block {opening[1]!r} begins within {opened[0]!r} of line {opened[1]}"
                )
            opened = opening[1], number
        else:
            if opened is None:
                raise BlockError(f"{label}:{number}: '{_CLOSING}' ends no block")
            blocks.append(Block(opened[0], opened[1], number))
            opened = None
    if opened is not None:
        raise BlockError(f"{label}:{opened[1]}: block {opened[0]!r} has no '{_CLOSING}'")
    return blocks


def content(text: str, block: Block) -> str:
    """What stands in a block now, without the empty lines around it."""
    return "\n".join(text.split("\n")[block.first : block.last - 1]).strip("\n")


def fill(text: str, blocks: list[Block], contents: Mapping[str, str]) -> str:
    """The document with `contents`, by name, in its blocks, an empty line on both sides."""
    lines = text.split("\n")
    for block in reversed(blocks):
        lines[block.first : block.last - 1] = ["", *contents[block.name].strip("\n").split("\n"), ""]
    return "\n".join(lines)
