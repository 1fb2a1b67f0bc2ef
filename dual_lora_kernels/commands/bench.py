"""``dual-lora bench``."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import dual_lora_kernels

from .common import Subparsers, ends_in_words

_DESCRIPTION = """\
What Dual LoRA costs in time and memory, beside what it is compared with, on this machine. Presets: layer, decode,
model, merge, scale, gpu. All have --quick (small sizes, a minute or two), --threads, --rounds, --out, --name and
--json (the results as a JSON object); dual-lora bench PRESET --help lists these and the preset's own.
"""
_EPILOG = """\
example:
  dual-lora bench layer --quick --threads 2

The suite is part of the project's source, not of the installed package: run this in a clone of the release that is
installed. Exit status: 0 measured, 1 the suite or something it needs is missing, or results cannot be written, 2 wrong
usage, 130 Ctrl-C.
"""


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what Dual LoRA costs on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", metavar="PRESET", help="what to measure")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="…", help="its options")

    @ends_in_words
    def measure(arguments: argparse.Namespace) -> int:
        import_suite()
        command = importlib.import_module("benchmarks.command")
        status: int = command.main([arguments.preset, *arguments.options], "dual-lora bench")
        return status

    def run(arguments: argparse.Namespace) -> int:
        arguments.json = "--json" in arguments.options
        return measure(arguments)

    parser.set_defaults(run=run)


def import_suite() -> None:
    """Import ``benchmarks`` from the folder that the package is in, or from the current one.

    Raises:
        ValueError: neither has this version's benchmarks, or another package of that name is imported already.
    """
    beside, here = Path(dual_lora_kernels.__file__).parents[1], Path.cwd()
    root = next((folder for folder in (beside, here) if _version(folder) == dual_lora_kernels.__version__), None)
    if root is None:
        other = _version(here)
        found = f"the current folder has those of {other}" if other else "not beside the package, not in this folder"
        raise ValueError(
            f"benchmarks: {found}, expected those of dual_lora_kernels {dual_lora_kernels.__version__}. They are part "
            "of the project's source: run this in a clone of that version"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))  # last: child processes are to import the package that is installed
    suite = importlib.import_module("benchmarks")
    if suite.__file__ is None or Path(suite.__file__).parents[1].resolve() != root.resolve():
        raise ValueError(f"benchmarks: Python imports another package of this name, {suite.__file__}")


def _version(folder: Path) -> str | None:
    """The version of the source tree that `folder` is, if it is one with benchmarks in it."""
    source = folder / "dual_lora_kernels" / "_version.py"
    if not (folder / "benchmarks" / "command.py").is_file() or not source.is_file():
        return None
    found = re.search(r'__version__ = "([^"]+)"', source.read_text(encoding="utf-8"))
    return found and found[1]
