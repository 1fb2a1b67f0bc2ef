"""``dual-lora doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TextIO

from .. import doctor, self_check
from .common import Subparsers

_EPILOG = """\
example:
  dual-lora doctor --check --json

Exit status: 0 layers run on every device and every check passes, 1 they do not, 2 wrong usage.
"""


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="which backend runs on each device, and why",
        description="Which backend runs on each device of this machine, and why the others do not.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
