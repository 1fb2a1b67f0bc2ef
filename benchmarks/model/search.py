"""Chooses tile shapes by the model: ``python -m benchmarks.model.search FAMILY… [--write]``; needs no GPU.

Of the shapes that `dual-lora tune` would time on a GPU, the one with the shortest predicted time whose every shipped
variant the static report accepts. ``--write`` puts it in the table; `compiler.origins` then states its counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels.backends import Estimator, ParameterGradients, Settings
from dual_lora_kernels.backends.triton import execute
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.backends.triton.shapes import PATH, TABLE, PanelShape, ProductShape, Shapes
from dual_lora_kernels.tuning import candidates
from dual_lora_kernels.tuning.candidates import Shape, Slot
from dual_lora_kernels.tuning.kernel_calls import PRODUCTS, RANK, shape_in_use
from dual_lora_kernels.tuning.tuner import write_table

from ..compiler.origins import STATIC
from ..compiler.recorded_step import layer_block, recording
from ..compiler.shipped_launches import shipped_cases
from ..compiler.static_report import Row, attempt, problems
from . import kernel_time
from .chips import CHIPS, Chip

LAYERS = ((1024, 1024), (4096, 4096), (14336, 4096))
"""N and K of the layers whose times are compared; of H a panel of a thousand rows."""
TOKEN_PRODUCT_TOKENS = 64
KERNELS = ("effective_weight", "factor_gradients", "token_product", *PRODUCTS)
_CUT = ("factor_gradients", *PRODUCTS)
"""Kernels whose work is cut for the programs that a unit holds."""
_MOST_PROGRAMS = 8


def _launches(chip: Chip, slot: Slot, rows: int, columns: int) -> list[Launch]:
    """What a pass launches with the table's shape of `slot`."""
    block = layer_block(rows, columns, RANK, torch.float32)
    x, grad = (torch.empty(slot.tokens, size, dtype=torch.bfloat16, device="meta") for size in (columns, rows))
    gradients = ParameterGradients.zeros(block.factors, [True] * 4, torch.float32)
    settings = Settings("fused", 1 << 40)
    with recording(Architecture(chip.family, chip.units)) as events:
        if slot.kernel in PRODUCTS:
            input = grad if slot.kernel == "input_gradient" else x
            execute.weight_product(slot.kernel, input, block, None, settings)
        elif slot.kernel == "token_product":
            execute.token_product(grad, x, block, Estimator("clip", 1.0), gradients, settings)
        elif slot.kernel == "effective_weight":
            execute.effective_weight(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"), block)
        else:
            h = torch.empty(min(rows, 1024), columns, device="meta")
            part = gradients.rows(0, len(h))
            execute.factor_gradients(h, block.rows(0, len(h)), Estimator("clip", 1.0), part, 1 << 40)
    return [event for event in events if isinstance(event, Launch)]


def predicted(chip: Chip, slot: Slot, shape: Shape) -> tuple[float, Shape]:
    """(the geometric mean of its seconds over `LAYERS`, the shape with the programs that a unit of the chip holds)."""
    if slot.kernel in _CUT:
        shape = replace(shape, programs_per_unit=programs_at_once(chip, slot, shape))
    with shape_in_use(chip.family, slot.kernel, shape):
        times = [sum(kernel_time.seconds(each, chip) for each in _launches(chip, slot, *layer)) for layer in LAYERS]
    return math.prod(times) ** (1 / len(times)), shape


def programs_at_once(chip: Chip, slot: Slot, shape: Shape) -> int:
    """How many programs a unit of the chip holds, tokens masked or not."""
    found = [_MOST_PROGRAMS]
    with shape_in_use(chip.family, slot.kernel, shape):
        for tokens in {slot.tokens, max(1, slot.tokens - 1)}:
            first = _launches(chip, replace(slot, tokens=tokens), *LAYERS[0])[0]
            plan = first.plan()
            found.append(kernel_time.residents(kernel_time.counts(first, plan, chip.family), plan, chip))
    return min(found)


def variants(family: str, slot: Slot, shape: Shape) -> Iterator[Row | str]:
    """The static report's rows of the shape, in whatever dtypes and with whatever masks it ships."""
    table = {family: with_shape(TABLE[family], slot, shape)}
    for case in shipped_cases([family], [slot.kernel], table):
        if case.shape == shape:
            yield attempt(case)


def refusal(row: Row | str) -> str | None:
    """What the static report says against it."""
    return next(iter(problems([row])), None) if isinstance(row, Row) else row


def with_shape(shapes: Shapes, slot: Slot, shape: Shape) -> Shapes:
    """`shapes` with `shape` for `slot`."""
    entry: dict[str, Any] = {slot.kernel: shape}
    if slot.kernel in PRODUCTS:
        entry = {slot.kernel: _sorted_entries(shapes, slot, shape)}
    return replace(shapes, **entry)


def _sorted_entries(shapes: Shapes, slot: Slot, shape: Shape) -> tuple[ProductShape, ...]:
    assert isinstance(shape, ProductShape)
    entries = [each for each in getattr(shapes, slot.kernel) if each.up_to != slot.up_to] + [shape]
    entries.sort(key=lambda each: math.inf if each.up_to is None else each.up_to)
    return tuple(entries)


def search(chip: Chip, slot: Slot, console: Console) -> Shape:
    """The fastest acceptable shape by the model, or the table's where none is."""
    shapes = TABLE[chip.family]
    found = []
    for shape in track(candidates.candidates(slot, shapes), slot.name, console=console, transient=True):
        try:
            found.append(predicted(chip, slot, replace(shape, source=STATIC)))
        except RuntimeError as error:
            console.print(f"{slot.name} {shape}: does not compile ({' '.join(str(error).split())[:100]})")
    found.sort(key=lambda each: each[0])
    for seconds, shape in found:
        text = f"{chip.family} {slot.name}: {1e6 * seconds:.1f} µs, {_describe(shape)}"
        reason = next(filter(None, map(refusal, variants(chip.family, slot, shape))), None)
        console.print(text + ("" if reason is None else f", refused: {reason}"))
        if reason is None:
            return shape
    console.print(f"{chip.family} {slot.name}: no candidate is acceptable, the table's stays")
    return candidates.current(slot, shapes)


def _describe(shape: Shape) -> str:
    tile = (
        (shape.rows, shape.columns) if isinstance(shape, PanelShape) else (shape.block_m, shape.block_n, shape.block_k)
    )
    sizes = "×".join(map(str, tile))
    return f"{sizes} {shape.warps}w {shape.stages}s, {shape.programs_per_unit} programs a unit"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model.search", description=__doc__)
    parser.add_argument("families", nargs="+", metavar="FAMILY", help=", ".join(chip.family for chip in CHIPS.values()))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="which (all)")
    parser.add_argument("--write", action="store_true", help="rewrite tile_shapes.json")
    options = parser.parse_args(arguments)
    console = Console()
    for family in options.families:
        chip = next(chip for chip in CHIPS.values() if chip.family == family)
        for kernel in options.kernels:
            for slot in candidates.slots(kernel, candidates.CLASS_TOKENS, TOKEN_PRODUCT_TOKENS):
                if kernel in PRODUCTS and slot.up_to is None:
                    continue  # panels are faster there
                TABLE[family] = with_shape(TABLE[family], slot, search(chip, slot, console))
        if options.write:
            write_table(PATH, family, TABLE[family])


if __name__ == "__main__":
    main()
