"""``dual-lora tune``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backends.triton.shapes import PATH as TILE_SHAPES
from .common import Subparsers


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
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
            from ..tuning.tuner import tune
        except ImportError as error:
            parser.error(f"tuning needs triton and rich: pip install 'triton>=3.6' rich ({error})")
        try:
            tune(arguments.kernels, arguments.minutes, arguments.out, arguments.tiny)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return 0

    parser.set_defaults(run=run)
