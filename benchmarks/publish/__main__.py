"""Write every table and picture of README.md and docs/ anew from the committed results.

    python -m benchmarks.publish            # rewrites what differs
    python -m benchmarks.publish --check    # exits with 1 where anything would

What stands between ``<!-- table: NAME -->`` and ``<!-- /table -->`` comes from the function of that name, and the SVG
pictures in docs/images from ``PICTURES``. Exits with 1, and the file and line, where a block has no such function, is
not closed or lies within another, or where a function or a picture is used by no document.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness.report import write_text
from . import __path__ as _package
from . import blocks
from .pictures import Picture, drawn_by_program

ROOT = Path(__file__).parents[2]
_LONGEST_DIFF = 16
"""Lines of a difference that are shown: enough to see what it is about."""
_COMMAND = "python -m benchmarks.publish"


@dataclass(frozen=True)
class Sources:
    """Everything that documents may show, by name."""

    tables: Mapping[str, Callable[[], str]]
    pictures: Mapping[str, Picture]


def sources() -> Sources:
    """Of all topics in this package.

    Raises:
        ValueError: two topics have the same name for something.
    """
    tables: dict[str, Callable[[], str]] = {}
    pictures: dict[str, Picture] = {}
    for found in pkgutil.iter_modules(_package):
        if found.name == "__main__":
            continue
        module = importlib.import_module(f"{__package__}.{found.name}")
        for name, all_of_them in (("TABLES", tables), ("PICTURES", pictures)):
            own = getattr(module, name, {})
            if twice := sorted(own.keys() & all_of_them.keys()):
                raise ValueError(f"{found.name}.py: {name} has {twice[0]!r}, which another topic has too")
            all_of_them.update(own)
    return Sources(tables, pictures)


def publish(root: Path, of: Sources, *, check: bool) -> list[str]:
    """Bring all documents and pictures under `root` up to date; with `check`, change nothing and say what would change.

    Returns what is wrong, an entry each, beginning with the file; nothing is left out because something else is wrong.
    """
    problems: list[str] = []
    used: set[str] = set()
    rendered: dict[str, str] = {}
    texts: list[str] = []
    for path in blocks.documents(root):
        label, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        texts.append(text)
        try:
            found = blocks.find(text, label)
        except blocks.BlockError as error:
            problems.append(str(error))
            continue
        used |= {block.name for block in found}
        unknown = [block for block in found if block.name not in of.tables]
        problems += [f"{label}:{block.first}: no topic writes a table {block.name!r}" for block in unknown]
        for block in found:
            if block.name in of.tables and block.name not in rendered:
                try:
                    rendered[block.name] = of.tables[block.name]()
                except Exception as error:  # whatever it is, the other tables are still to be written
                    problems.append(f"{label}:{block.first}: table {block.name!r} cannot be written: {_where(error)}")
        known = [block for block in found if block.name in rendered]
        new = blocks.fill(text, known, rendered)
        if check:
            problems += [
                f"{label}:{block.first}: table {block.name!r} is not what the results give:\n{difference}"
                for block in known
                if (difference := _difference(blocks.content(text, block), rendered[block.name]))
            ]
        elif new != text:
            write_text(path, new)
    problems += [f"table {name!r}: no document shows it" for name in sorted(of.tables.keys() - used)]
    return problems + _publish_pictures(root, of.pictures, "\n".join(texts), check=check)


def _publish_pictures(root: Path, pictures: Mapping[str, Picture], documents: str, *, check: bool) -> list[str]:
    problems: list[str] = []
    folder = root / "docs" / "images"
    for name, picture in pictures.items():
        path = folder / f"{name}.svg"
        label = path.relative_to(root).as_posix()
        if f"images/{path.name}" not in documents:
            problems.append(f"{label}: no document shows it")
        try:
            if picture.is_current(path):
                continue
            if check:
                problems.append(f"{label}: drawn from other numbers or by another source")
            else:
                picture.write(path)
        except Exception as error:  # as with tables
            problems.append(f"{label}: cannot be drawn: {_where(error)}")
    stale = [path for path in drawn_by_program(folder) if path.stem not in pictures]
    return problems + [f"{path.relative_to(root).as_posix()}: no topic draws it any more" for path in stale]


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def _difference(old: str, new: str) -> str:
    lines = list(
        difflib.unified_diff(old.split("\n"), new.strip("\n").split("\n"), "document", "results", lineterm="", n=0)
    )
    shown = lines[:_LONGEST_DIFF]
    return "\n".join([*shown, *([f"… {len(lines) - len(shown)} more lines"] if len(lines) > len(shown) else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog=_COMMAND, description="Tables and pictures of README.md and docs/ from the committed results."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where anything differs")
    options = parser.parse_args(arguments)
    problems = publish(ROOT, sources(), check=options.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and options.check:
        print(f"\n{len(problems)} problems; {_COMMAND} brings tables and pictures up to date", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
