"""The command line, ``dual-lora`` or ``python -m dual_lora_kernels.cli``.

A subcommand is a function that adds its parser, and its line in `_SUBCOMMANDS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from . import doctor, self_check
from .backends.triton.shapes import PATH as TILE_SHAPES

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def _add_doctor(subparsers: _Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="which backend runs on each device, and why",
        description="Which backend runs on each device of this machine, and why the others do not. "
        "The exit status is 0 where layers run on every device and every check passes, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="the same facts as a JSON object, for bug reports")
    parser.add_argument(
        "--check", action="store_true", help="try on every backend and device what the package promises (a minute)"
    )

    def run(arguments: argparse.Namespace) -> int:
        facts = doctor.examine()
        document = dataclasses.asdict(facts)
        if not arguments.json:
            print(doctor.render(facts), flush=True)
        healthy = facts.healthy
        if arguments.check:
            outcomes = _check(facts, sys.stderr if arguments.json else sys.stdout)
            document["checks"] = [dataclasses.asdict(outcome) for outcome in outcomes]
            healthy = healthy and all(outcome.passed is not False for outcome in outcomes)
        if arguments.json:
            print(json.dumps(document, indent=2))
        return 0 if healthy else 1

    parser.set_defaults(run=run)


def _check(facts: doctor.Facts, stream: TextIO) -> list[self_check.Outcome]:
    """Make the checks, a line each on `stream` as they come."""
    print(file=stream)
    devices = [device.device for device in facts.devices]

    def report(outcome: self_check.Outcome) -> None:
        _progress("")
        print(outcome, file=stream, flush=True)

    outcomes = self_check.run(devices, report, lambda check: _progress(f"checking {check} …"))
    verdicts = [outcome.passed for outcome in outcomes]
    print(f"\n{verdicts.count(True)} passed, {verdicts.count(False)} failed", file=stream, flush=True)
    return outcomes


def _progress(text: str) -> None:
    """Show `text` on the last line of the terminal, in place of what was there; nothing where there is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _add_tune(subparsers: _Subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="measure the Triton kernels' tile shapes on this GPU",
        description="Measure the Triton kernels' tile shapes on this GPU and rewrite its entries of the table.",
    )
    parser.add_argument("--kernels", nargs="+", default=[], metavar="KERNEL", help="default: all")
    parser.add_argument("--minutes", type=float, default=6.0, help="time budget (6)")
    parser.add_argument("--out", type=Path, default=TILE_SHAPES, help="table to rewrite (the installed one)")
    parser.add_argument("--tiny", action="store_true", help="walk through it in Triton's interpreter; needs --out")

    def run(arguments: argparse.Namespace) -> int:
        try:
            from .tuning.tuner import tune
        except ImportError as error:
            parser.error(f"tuning needs triton and rich: pip install 'triton>=3.6' rich ({error})")
        try:
            tune(arguments.kernels, arguments.minutes, arguments.out, arguments.tiny)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return 0

    parser.set_defaults(run=run)


_SUBCOMMANDS: tuple[Callable[[_Subparsers], None], ...] = (_add_doctor, _add_tune)
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
