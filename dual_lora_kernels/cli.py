"""The command line, ``dual-lora`` or ``python -m dual_lora_kernels.cli``.

A subcommand is a file in `commands` and its line in `_SUBCOMMANDS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .commands import bench, convert, doctor, inspect, merge, tune
from .commands.common import Subparsers

_SUBCOMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    doctor.add,
    bench.add,
    merge.add,
    inspect.add,
    convert.add,
    tune.add,
)
"""Each adds a parser whose default ``run`` takes the arguments and returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default the process's) and return its exit status; 2, by SystemExit, for wrong usage."""
    parser = argparse.ArgumentParser(prog="dual-lora", description="Dual LoRA fine-tuning: tools.")
    subparsers = parser.add_subparsers(metavar="command", required=True, dest="command")
    for add in _SUBCOMMANDS:
        add(subparsers)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())
