"""The command line, ``dual-lora`` or ``python -m dual_lora_kernels.cli``.

A subcommand is a function that adds its parser, and its line in `_SUBCOMMANDS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import doctor

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def _add_doctor(subparsers: _Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="which backend runs on each device, and why",
        description="Which backend runs on each device of this machine, and why the others do not. "
        "The exit status is 0 where layers run on every device, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="the same facts as a JSON object, for bug reports")

    def run(arguments: argparse.Namespace) -> int:
        facts = doctor.examine()
        print(json.dumps(dataclasses.asdict(facts), indent=2) if arguments.json else doctor.render(facts))
        return 0 if facts.healthy else 1

    parser.set_defaults(run=run)


_SUBCOMMANDS: tuple[Callable[[_Subparsers], None], ...] = (_add_doctor,)
"""Each adds a parser whose default ``run`` takes the arguments and returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default the process's) and return its exit status; 2, by SystemExit, for wrong usage."""
    parser = argparse.ArgumentParser(prog="dual-lora", description="Dual LoRA fine-tuning: tools.")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())
