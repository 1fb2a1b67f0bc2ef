"""``dual-lora tune``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..backends.triton.shapes import PATH as TILE_SHAPES
from .common import Subparsers, ends_in_words

_EPILOG = """\
example:
  dual-lora tune --kernels forward --minutes 3 --out shapes.json

Exit status: 0 the table is rewritten, 1 there is no GPU, or the table cannot be written, 2 wrong usage, 130 Ctrl-C.
"""


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "tune",
        help="measure the Triton kernels' tile shapes on this GPU",
        description="Measure the Triton kernels' tile shapes on this GPU and rewrite its entries of the table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", nargs="+", default=[], metavar="KERNEL", help="default: all")
    parser.add_argument("--minutes", type=float, default=6.0, help="time budget (6)")
    parser.add_argument("--out", type=Path, default=TILE_SHAPES, help="table to rewrite (the installed one)")
    parser.add_argument("--tiny", action="store_true", help="walk through it in Triton's interpreter; needs --out")
    parser.add_argument("--json", action="store_true", help="what was done as a JSON object; the rest goes to stderr")

    @ends_in_words
    def run(arguments: argparse.Namespace) -> int:
        try:
            from ..tuning.tuner import tune
        except ImportError as error:
            raise ValueError(f"tuning needs triton: pip install 'triton>=3.6' ({error})") from error
        family = tune(arguments.kernels, arguments.minutes, arguments.out, arguments.tiny, to_stderr=arguments.json)
        if arguments.json:
            print(json.dumps({"family": family, "table": str(arguments.out)}))
        return 0

    parser.set_defaults(run=run)
