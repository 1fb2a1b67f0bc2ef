"""The options of presets that measure single layers: which layers, and on what device."""

from __future__ import annotations

import argparse

from ..layers.cases import Shape
from . import arguments


def add(parser: argparse.ArgumentParser) -> None:
    """``--shape`` and others, each with any number of values, of which all combinations are measured; ``--device``."""
    group = parser.add_argument_group("layers", "all combinations of these, in place of the preset's own")
    group.add_argument("--shape", type=arguments.shape, nargs="+", metavar="OUTxIN", help="of the weight (4096x4096)")
    group.add_argument("--tokens", type=arguments.count, nargs="+", metavar="M", help="tokens at once (512)")
    group.add_argument("--dtype", type=arguments.dtype, nargs="+", metavar="DTYPE", help="fp32, bf16 or fp16 (fp32)")
    group.add_argument("--rank", type=arguments.count, nargs="+", metavar="R", help="r1 = r2; others' follow (16)")
    arguments.add_device(parser)


def named(options: argparse.Namespace) -> list[Shape]:
    """The layers that the options name; none where there are none of these options."""
    if not (options.shape or options.tokens or options.dtype or options.rank):
        return []
    return [
        Shape(shape[0], shape[1], tokens, dtype, rank)
        for dtype in options.dtype or ["fp32"]
        for shape in options.shape or [(4096, 4096)]
        for tokens in options.tokens or [512]
        for rank in options.rank or [16]
    ]
