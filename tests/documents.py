"""README and documentation as GitHub reads them: examples, commands, links and anchors."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = [
    name.relative_to(ROOT).as_posix()
    for name in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/demo/README.md",
                 *sorted((ROOT / "docs").rglob("*.md")))
]  # fmt: skip
"""What people write by hand; the changelog speaks of what has been."""
_PARSER = MarkdownIt("commonmark").enable("table")
_MEASURED = re.compile(r"<!-- table: .*?<!-- /table -->", re.DOTALL)
_NOTHING = re.compile(r"(?!)")
_SHELL = ("", "bash", "sh", "console")
"""Languages of fences that may have commands; indented code has none."""


class Example(NamedTuple):
    """A fence of Python."""

    page: str
    line: int
    """Of its first line of code, counted from 1."""
    code: str

    def run(self, names: dict[str, Any]) -> None:
        """Run it with `names`, to which it adds; a traceback shows the page and its line."""
        exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), names)


class Command(NamedTuple):
    """A shell command, or the beginning of one that a sentence names."""

    page: str
    words: tuple[str, ...]
    is_whole: bool
    """Whether it stands in a block, as it is typed."""


class Link(NamedTuple):
    page: str
    target: str


def _tokens(page: str, leave_out: re.Pattern[str] = _NOTHING) -> Iterator[Token]:
    for token in _PARSER.parse(leave_out.sub("", (ROOT / page).read_text(encoding="utf-8"))):
        yield token
        yield from token.children or ()


def examples(page: str) -> list[Example]:
    """The page's Python examples, in their order."""
    return [
        Example(page, token.map[0] + 2, token.content)
        for token in _tokens(page)
        if token.type == "fence" and token.info == "python" and token.map
    ]


def commands(page: str) -> Iterator[Command]:
    """The commands in the page's blocks, and those that its sentences name in code.

    Tables that are written from results say by which command they were measured, at the commit that they name; those
    are left out.
    """
    for token in _tokens(page, leave_out=_MEASURED):
        if token.type == "code_block" or (token.type == "fence" and token.info in _SHELL):
            for line in token.content.replace("\\\n", " ").splitlines():
                if words := words_of(line):
                    yield Command(page, words, True)
        elif token.type == "code_inline" and (words := words_of(token.content)):
            yield Command(page, words, False)


def words_of(line: str) -> tuple[str, ...]:
    """A command's words; none where the line is not a command."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a lone apostrophe: prose or Python
        return ()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return tuple(words)


def links(page: str) -> Iterator[Link]:
    """The page's links and pictures."""
    for token in _tokens(page):
        target = token.attrGet("href") if token.type == "link_open" else token.attrGet("src")
        if token.type in ("link_open", "image"):
            yield Link(page, str(target))


def named_in_code(page: str) -> Iterator[str]:
    """What stands in the page's inline code."""
    return (token.content for token in _tokens(page) if token.type == "code_inline")


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to a Markdown file's headings."""
    found: set[str] = set()
    tokens = _PARSER.parse(file.read_text(encoding="utf-8"))
    for opening, inside in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inside.children or () if child.type in ("text", "code_inline"))
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number = sum(
                anchor == name or re.fullmatch(re.escape(name) + r"-\d+", anchor) is not None for anchor in found
            )
            found.add(f"{name}-{number}" if number else name)
    return found
