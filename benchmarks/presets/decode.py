"""``decode``: a few tokens through unmerged, prepared and merged layers, beside the layer without an adapter."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..harness.environment import environment
from ..harness.results import Case, Results
from ..layers.cases import Shape, decode_case
from ..layers.methods import LABELS
from ..layers.products import slow_products
from . import layer_options

HELP = "a few tokens through a layer: unmerged, prepared and merged, beside the layer without an adapter"
_TOKENS = (1, 4, 16)


def add(parser: argparse.ArgumentParser) -> None:
    """Add which layers."""
    layer_options.add(parser)


def run(options: argparse.Namespace, console: Console) -> Results:
    """Measure the layers that the options name, or 1, 4 and 16 tokens through the preset's."""
    about = environment(options.device)
    wanted, notes = _wanted(options)
    cases = tuple(decode_case(shape, rounds=options.rounds, device=options.device, console=console) for shape in wanted)
    return Results("decode", "", about, cases, notes=notes)


def _wanted(options: argparse.Namespace) -> tuple[list[Shape], tuple[str, ...]]:
    """Layers, and what is to be said of the choice."""
    if named := layer_options.named(options):
        return named, ()
    if options.quick:
        return [Shape(1024, 1024, tokens) for tokens in _TOKENS], ()
    slow = slow_products("bf16", options.device)
    size = 4096 if slow is None else 1024
    notes = () if slow is None else (f"In bf16 {size}² was measured: {slow}.",)
    layers = [Shape(4096, 4096, tokens) for tokens in _TOKENS]
    return [*layers, *(Shape(size, size, tokens, "bf16") for tokens in _TOKENS)], notes


def table(case: Case) -> tuple[str, list[str], list[list[str]]]:
    """Time of a layer, and its ratio to that of the layer without an adapter."""
    about = case.settings
    title = (
        f"Decoding, {about['dtype']}, {about['out_features']} × {about['in_features']}, tokens: {about['tokens']}, "
        f"r1 = r2 = {about['rank']}; ×: over no adapter"
    )
    rows = []
    for name in case.timed():
        ratio = case.ratio(name)
        spread = f"{ratio.lower:.2f}–{ratio.upper:.2f}"
        rows.append([LABELS[name], f"{case.seconds(name).median * 1e3:,.3f}", f"{ratio.median:.2f}", spread])
    return title, ["subject", "ms", "×", "quartiles"], rows
