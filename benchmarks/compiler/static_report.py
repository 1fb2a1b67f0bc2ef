"""What the compiler made of every shipped kernel and tile shape: registers, spills, shared memory, instructions.

``python -m benchmarks.compiler.static_report [--check]`` needs no GPU: it compiles ahead of time for each chip family
and reads the machine code. It counts and does not time: a count of instructions says nothing of latency, of memory, or
of how much of it overlaps, and not every instruction costs the same.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from triton.errors import TritonError

import dual_lora_kernels
from dual_lora_kernels.backends.triton.launches import rank_block
from dual_lora_kernels.backends.triton.shapes import PanelShape, ProductShape

from ..harness import report
from .ahead_of_time import compile_launch, target
from .disassembly import CLASSES, class_counts, disassemble, inner_loop, matrix_instructions, spill_accesses
from .shipped_launches import FAMILIES, KERNELS, MASKS, Case, dtype_name, shipped_cases, sum_cases

SHARED_LIMIT_KIB = {
    "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
    "gfx90a": 64, "gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1201": 64,
}  # fmt: skip
"""Shared memory that one block may take, per chip."""

MOST_SPILLS_OUTSIDE_A_LOOP = 200
"""Of masked kernels; a fused product for 256 tokens makes thousands of loads a tile."""

ACCEPTED_SPILLS = {
    ("sm_90", "input_gradient", "64×64×64"): 60,  # fp32 factors of rank 17 to 31; 8 warps take twice the instructions
    ("gfx1100", "effective_weight", "64×64"): 200,  # fp32 weights that end within a tile, Triton 3.6
    ("sm_100", "add_partials", "16×32"): 2,  # Triton 3.9; the kernel runs once a panel
}
"""Chip, kernel and tile → spills that the shapes without them are not worth."""

ACCEPTED_TWIN_SPILLS = 32
"""Registers that an NF4 kernel, or one for drawn columns, may move aside: its shapes are those without. AMD's have
accumulation registers for them; with Triton 3.6, ∂X on sm_80 uses 56 bytes of stack, drawn columns on gfx1100 104."""

UNFIT_FOUR_BIT = {("sm_89", "forward", "128×128×64")}
"""Chip, kernel and tile of NF4 kernels that exceed shared memory. ``"auto"`` has panels for so many tokens; where a
user asks for ``"fused"``, panels run as well, with a warning (`execute._run_fitting`)."""

_H100_SMS = 132
_H100_LANES = 128  # an SM issues one instruction to each of 4 schedulers × 32 lanes per cycle
_H100_CLOCK = 1.755e9
_H100_BANDWIDTH = 3.0e12  # bytes per second, as copies reach it
_READ_BYTES = 2  # per element of W0 in bf16; writing W takes as many
ISSUE_SLOTS_PER_BYTE = _H100_SMS * _H100_LANES * _H100_CLOCK / _H100_BANDWIDTH
"""Lane-instructions that an H100 issues while its memory moves one byte."""

_SCHEDULERS = 4
_H100_BF16_FMA = 2048  # per SM and cycle
_H100_TF32_FMA = 1024
_TF32_PRODUCTS = 3  # of split fp32 factors

NOTE = (
    "Static counts from the compiled code, not timings: instructions differ in cost, and nothing here says how well "
    "they overlap with each other or with memory. *step*: instructions of the inner loop (the longest loop, of those "
    "with matrix instructions if there are any), or of the whole program where there is none. *spills*: local loads "
    "and stores (NVIDIA), spilled registers (AMD), with bytes of stack. *issue : tensor* (sm_90): warp instructions of "
    "a step, over "
    f"{_SCHEDULERS} schedulers, per cycle that the tensor cores need for the step at {_H100_BF16_FMA} bf16 or "
    f"{_H100_TF32_FMA} TF32 multiply-adds a cycle; above 1 the tensor cores wait for instructions. *slots*: "
    "lane-instructions per element of W. On an H100 generating W stays bound by memory up to "
    f"{2 * _READ_BYTES * ISSUE_SLOTS_PER_BYTE:.1f} (W0 read, W written), a fused product for few tokens, which only "
    f"reads W0, up to {_READ_BYTES * ISSUE_SLOTS_PER_BYTE:.1f}."
)


@dataclass(frozen=True)
class Row:
    """One compiled case. `step` counts instructions of the inner loop by class; `whole` where that is the program."""

    name: str
    family: str
    chip: str
    kernel: str
    compute: str
    factors: str
    rank: int
    tile: str
    warps: int
    stages: int
    up_to: int | None
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix: dict[str, int]
    needs_matrix: bool
    step: dict[str, int]
    whole: bool
    masks: str
    four_bit: bool
    drawn: bool
    step_spills: int
    issue_slots_per_element: float | None
    issue_per_tensor_cycle: float | None


def measure(case: Case) -> Row:
    """Compile `case` and count."""
    compiled = compile_launch(case.launch(), case.chip)
    instructions, resources = disassemble(compiled)
    loop = None if case.kernel == "effective_weight" else inner_loop(instructions)
    counted = instructions if loop is None else loop
    shape = case.shape
    slots = ratio = None
    if case.kernel in ("effective_weight", "forward", "input_gradient"):
        elements = shape.rows * shape.columns if isinstance(shape, PanelShape) else shape.block_n * shape.block_k
        slots = len(counted) * target(case.chip).warp_size * shape.warps / elements
    if isinstance(shape, ProductShape) and case.family == "sm_90":
        ratio = (
            len(counted) * shape.warps / _SCHEDULERS / tensor_cycles(case.kernel, shape, case.factor_dtype, case.rank)
        )
    return Row(
        name=case.name,
        family=case.family,
        chip=case.chip,
        kernel=case.kernel,
        compute=dtype_name(case.compute_dtype),
        factors=dtype_name(case.factor_dtype),
        rank=case.rank,
        tile=case.tile,
        warps=shape.warps,
        stages=shape.stages,
        up_to=shape.up_to if isinstance(shape, ProductShape) else None,
        registers=resources.registers,
        spills=resources.spills,
        stack_bytes=resources.stack_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT_KIB[case.chip] * 1024,
        matrix=matrix_instructions(counted),
        needs_matrix=needs_matrix(case),
        step=class_counts(counted),
        whole=loop is None,
        masks=case.masks,
        four_bit=case.four_bit,
        drawn=case.drawn,
        step_spills=spill_accesses(counted),
        issue_slots_per_element=slots,
        issue_per_tensor_cycle=ratio,
    )


def tensor_cycles(kernel: str, shape: ProductShape, factor_dtype: torch.dtype, rank: int) -> float:
    """Cycles that the tensor cores of one of an H100's SMs need for one step of a fused kernel in 16 bits."""
    cycles = shape.block_m * shape.block_n * shape.block_k / _H100_BF16_FMA
    if kernel == "token_product":
        return cycles  # the factors come after its loop
    fma = shape.block_n * shape.block_k * 2 * rank_block(rank).block  # P and Q, both of this rank
    if factor_dtype == torch.float32:
        return cycles + _TF32_PRODUCTS * fma / _H100_TF32_FMA
    return cycles + fma / _H100_BF16_FMA


def needs_matrix(case: Case) -> bool:
    """Whether the kernel must use matrix instructions, or it would be far too slow.

    Not for fp32 and fp64 computation; nor for fp32 products on AMD's RDNA chips, whose matrix units take 16 bits only.
    """
    if case.compute_dtype.itemsize != 2:
        return False
    multiplies_16_bits = isinstance(case.shape, ProductShape) or case.factor_dtype.itemsize == 2
    return multiplies_16_bits or not case.chip.startswith("gfx1")


def problems(rows: Iterable[Row]) -> list[str]:
    """What ``--check`` refuses, one line each."""
    found = []
    for row in rows:
        if (row.spills or row.stack_bytes) and not _costs_once_a_tile(row):
            found.append(f"{row.name}: {row.spills} spills, {row.stack_bytes} bytes of stack")
        if row.needs_matrix and not row.matrix:
            found.append(f"{row.name}: no matrix instruction")
        if _multiplies_ranks_synchronously(row):
            found.append(
                f"{row.name}: its rank product is mma.sync's, where the chip's other kernels use wgmma or tcgen05"
            )
        is_known = row.four_bit and (row.chip, row.kernel, row.tile) in UNFIT_FOUR_BIT
        if row.shared_bytes > row.shared_limit and not is_known:
            found.append(f"{row.name}: {row.shared_bytes} bytes of shared memory, the limit is {row.shared_limit}")
    return found


def _multiplies_ranks_synchronously(row: Row) -> bool:
    """Whether a kernel of W sums fp32 factors by other matrix instructions than its chip's rest: W must be the same.

    With bf16 factors the names do not tell the products apart, and all shapes' products are exact.
    """
    makes_weight = row.kernel in ("effective_weight", "forward", "input_gradient")
    in_question = row.family in ("sm_90", "sm_100") and makes_weight and row.factors == "fp32"
    return in_question and any(name.startswith("HMMA") and "TF32" in name for name in row.matrix)


def _costs_once_a_tile(row: Row) -> bool:
    """Whether spills are known, or few and in a masked kernel outside its loop: reported, and not refused."""
    is_outside = row.masks != "none" and not row.whole and not row.step_spills
    accepted = ACCEPTED_SPILLS.get((row.chip, row.kernel, row.tile), 0)
    if row.four_bit or row.drawn:
        accepted = max(accepted, ACCEPTED_TWIN_SPILLS)
    most = max(accepted, MOST_SPILLS_OUTSIDE_A_LOOP if is_outside else 0)
    return 0 < most >= row.spills


def attempt(case: Case) -> Row | str:
    """`measure`, or the line that says how compiling failed."""
    try:
        return measure(case)
    except (TritonError, RuntimeError) as error:  # RuntimeError: a pass or the translation to LLVM gave up
        return f"{case.name}: does not compile ({' '.join(str(error).split())[:200]})"


def measure_all(cases: Sequence[Case], workers: int, console: Console) -> tuple[list[Row], list[str]]:
    """All rows, in order, and the failures to compile; with a progress bar."""
    context = multiprocessing.get_context("spawn")  # LLVM and PyTorch hold threads, which do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = list(track(pool.map(attempt, cases), "compiling", total=len(cases), console=console))
    return [item for item in results if isinstance(item, Row)], [item for item in results if isinstance(item, str)]


HEADINGS = (
    "kernel and tile", "registers", "spills", "shared KiB", "matrix instructions", "step", *CLASSES[1:],
    "issue : tensor", "slots",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One line of the table; `matrix` is given by name, the other classes by number."""
    matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items())
    return [
        row.name.removeprefix(f"{row.family} "),
        str(row.registers),
        f"{row.spills} ({row.stack_bytes} B)" if row.spills or row.stack_bytes else "0",
        f"{row.shared_bytes / 1024:.0f} of {row.shared_limit // 1024}",
        matrix or "none",
        f"{sum(row.step.values())}" + (" (whole)" if row.whole else ""),
        *(str(row.step[name]) for name in CLASSES[1:]),
        "" if row.issue_per_tensor_cycle is None else f"{row.issue_per_tensor_cycle:.2f}",
        "" if row.issue_slots_per_element is None else f"{row.issue_slots_per_element:.1f}",
    ]


def versions() -> dict[str, str]:
    """What the counts depend on, and when they were taken. Ahead-of-time compilation does not depend on the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "dual_lora_kernels": dual_lora_kernels.__version__,
    }


def write(rows: Sequence[Row], folder: Path, found: Sequence[str]) -> None:
    """Markdown and JSON."""
    about = versions()
    document: dict[str, Any] = {
        "versions": about,
        "issue_slots_per_byte_of_an_h100": ISSUE_SLOTS_PER_BYTE,
        "problems": list(found),
        "rows": [asdict(row) for row in rows],
    }
    paragraphs = [
        "# What the compiler made of the kernels",
        ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
        NOTE,
        "\n".join(["Problems:", "", *(f"- {line}" for line in found)]) if found else "No problems.",
    ]
    for family, group in _by_family(rows):
        paragraphs += [f"## {family}", report.markdown_table(HEADINGS, [cells(row) for row in group])]
    report.write(folder, "static_report", document, paragraphs)


def _by_family(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for family, group in itertools.groupby(rows, key=lambda row: row.family):
        yield family, list(group)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiler.static_report",
        description="Registers, spills, shared memory and instructions of every shipped kernel and tile shape.",
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="default: all")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="default: all")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS, help="masked for what; default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (2)")
    parser.add_argument(
        "--out", type=Path, help="folder for results (a full report: benchmarks/results; a partial one: printed only)"
    )
    parser.add_argument("--check", action="store_true", help="fail on a spill, no matrix unit, too much shared memory")
    options = parser.parse_args(arguments)
    console = Console()
    cases = list(shipped_cases(options.families, options.kernels, masks=options.masks))
    if list(options.kernels) == list(KERNELS):
        cases += sum_cases(options.families)
        cases.sort(key=lambda case: FAMILIES.index(case.family))
    rows, failures = measure_all(cases, options.workers, console)
    console.print(NOTE)
    found = [*failures, *problems(rows)]
    is_full = all(
        list(one) == list(whole)
        for one, whole in ((options.families, FAMILIES), (options.kernels, KERNELS), (options.masks, MASKS))
    )
    folder = options.out or (report.RESULTS if is_full else None)
    if folder is not None:
        write(rows, folder, found)
        console.print(f"written to {folder}: static_report.json, .md")
    for line in found:
        console.print(line, style="red", highlight=False)
    if options.check and found:
        sys.exit(f"{len(found)} problems")


if __name__ == "__main__":
    main()
