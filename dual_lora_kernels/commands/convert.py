"""``dual-lora convert``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..adapter_conversion import FORMATS, convert_adapter
from .common import Subparsers, ends_in_words

_EPILOG = """\
example:
  dual-lora convert runs/adapter runs/adapter-peft --base-model meta-llama/Meta-Llama-3-8B

Values stay as they are, bit for bit. Exit status: 0 converted, 1 something does not fit, is damaged or cannot be
written, 2 wrong usage.
"""


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "convert",
        help="an adapter from this package's files to PEFT's, or back",
        description="Write a saved adapter in the other format: this package's file or PEFT's files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a saved adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must be new or empty")
    parser.add_argument("--to", choices=FORMATS, help="format to write (the one that ADAPTER is not in)")
    parser.add_argument(
        "--base-model", metavar="NAME", help="in PEFT's files, the base model's name or path (what ADAPTER says of it)"
    )
    parser.add_argument("--json", action="store_true", help="what was done as a JSON object")

    @ends_in_words
    def run(arguments: argparse.Namespace) -> int:
        done = convert_adapter(arguments.adapter, arguments.out, to=arguments.to, base_model=arguments.base_model)
        if arguments.json:
            print(json.dumps(done._asdict(), indent=2))
        else:
            print(
                f"{done.out}: {done.layers} layers, {done.tensors} tensors, from {done.source} to {done.target} format"
            )
            for note in done.notes:
                print(note)
        return 0

    parser.set_defaults(run=run)
