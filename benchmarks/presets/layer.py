"""``layer``: one layer's training step, every method beside the three products that none can avoid."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..harness.environment import environment
from ..harness.report import MEBIBYTE
from ..harness.results import Case, Results
from ..layers.cases import STEP_SUBJECTS, Shape, step_case
from ..layers.methods import LABELS
from ..layers.products import slow_products
from . import layer_options

HELP = "one layer's training step: time over its three products, and temporary memory"
_MAIN = ("frozen", "full", "lora", "dora", "naive", "dual_lora", "dual_lora_half", "dual_lora_quarter")
"""The subjects of large layers, except one: with all of them a run would take twice as long."""
_LAYERS: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    (Shape(4096, 4096, 512), STEP_SUBJECTS),
    (Shape(4096, 4096, 2048), _MAIN),
    (Shape(4096, 4096, 128), _MAIN),
    (Shape(4096, 4096, 512, rank=64), _MAIN),
    (Shape(4096, 11008, 512), _MAIN),
    (Shape(1024, 1024, 512), STEP_SUBJECTS),
    (Shape(768, 768, 512), STEP_SUBJECTS),
    (Shape(256, 256, 512), STEP_SUBJECTS),
    (Shape(256, 256, 128), STEP_SUBJECTS),
    (Shape(4096, 4096, 512, "bf16"), STEP_SUBJECTS),
    (Shape(4096, 4096, 2048, "bf16"), _MAIN),
    (Shape(1024, 1024, 512, "bf16"), STEP_SUBJECTS),
)
_SLOW_LAYER = Shape(512, 512, 128, "bf16")
"""In place of those in bf16, where 4096² with 512 tokens would take 256 times as long, an hour for all subjects."""
_QUICK_LAYERS = (Shape(1024, 1024, 512), Shape(256, 256, 128))


def add(parser: argparse.ArgumentParser) -> None:
    """Add which layers and which subjects."""
    layer_options.add(parser)
    names = ", ".join(STEP_SUBJECTS)
    parser.add_argument(
        "--subjects", choices=STEP_SUBJECTS, nargs="+", metavar="NAME", help=f"beside the floor, some of: {names}"
    )


def run(options: argparse.Namespace, console: Console) -> Results:
    """Measure the layers that the options name, or the preset's."""
    about = environment(options.device)
    wanted, notes = _wanted(options)
    cases = tuple(
        step_case(shape, options.subjects or subjects, rounds=options.rounds, device=options.device, console=console)
        for shape, subjects in wanted
    )
    return Results("layer", "", about, cases, notes=notes)


def _wanted(options: argparse.Namespace) -> tuple[list[tuple[Shape, tuple[str, ...]]], tuple[str, ...]]:
    """Layers, each with its subjects, and what is to be said of the choice."""
    if named := layer_options.named(options) or (_QUICK_LAYERS if options.quick else ()):
        return [(shape, STEP_SUBJECTS) for shape in named], ()
    slow = slow_products("bf16", options.device)
    if slow is None:
        return list(_LAYERS), ()
    small = f"{_SLOW_LAYER.out_features}² with {_SLOW_LAYER.tokens} tokens"
    kept = [(shape, subjects) for shape, subjects in _LAYERS if shape.dtype == "fp32"]
    return [*kept, (_SLOW_LAYER, STEP_SUBJECTS)], (f"Only {small} was measured in bf16: {slow}.",)


def table(case: Case) -> tuple[str, list[str], list[list[str]]]:
    """Time, its ratio to the three products, and temporary memory; narrow enough for 80 columns."""
    about = case.settings
    title = (
        f"Training step, {about['dtype']}, {about['out_features']} × {about['in_features']}, {about['tokens']} tokens, "
        f"r1 = r2 = {about['rank']}; ×: over the three products"
    )
    return title, ["subject", "ms", "×", "quartiles", "MiB"], [_row(case, name) for name in case.timed()]


def _row(case: Case, name: str) -> list[str]:
    ratio, memory = case.ratio(name), case.subjects[name].bytes.get("temporary")
    return [
        LABELS[name],
        _short(case.seconds(name).median * 1e3),
        f"{ratio.median:.2f}",
        f"{ratio.lower:.2f}–{ratio.upper:.2f}",
        "–" if memory is None else _short(memory / MEBIBYTE),
    ]


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
