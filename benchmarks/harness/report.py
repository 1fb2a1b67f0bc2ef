"""Results as a table on the terminal, Markdown for people and JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results"
"""Where results land unless the user names another folder."""
MEBIBYTE = 2**20


def print_table(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]], console: Console) -> None:
    """The first column to the left, numbers to the right."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """The same table in Markdown; `words` are the columns that are to the left."""
    alignment = ["---" if index in words else "---:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, alignment, *cells))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all: an interrupted benchmark leaves the last complete version."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write(folder: Path, stem: str, document: dict[str, Any], paragraphs: Sequence[str]) -> None:
    """`document` as ``stem.json`` and `paragraphs` as ``stem.md`` in `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{stem}.json", json.dumps(document, indent=1) + "\n")
    write_text(folder / f"{stem}.md", "\n\n".join(paragraphs) + "\n")
