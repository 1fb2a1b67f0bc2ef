"""How long a compiled kernel should take: the largest of its memory, issue, matrix and latency times, wave by wave."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from dual_lora_kernels.backends.triton.launch import Launch, Plan
from dual_lora_kernels.backends.triton.launches import ceil_div

from ..compiler.ahead_of_time import compile_launch
from ..compiler.disassembly import Instruction, disassemble, inner_loop
from .chips import Chip

_SCHEDULERS = 4
_BARRIER_CYCLES = 60
"""A barrier, and the read of shared memory that waits behind it."""
_MATRIX_WAIT_CYCLES = 60
_MEMORY_CYCLES = 600
"""Of a load that nothing was fetched ahead for: L2 and device memory of an H100 take 250 to 800."""
_LONE_ISSUE_RATE = 0.6
"""Instructions a cycle of a scheduler with a single warp, whose instructions depend on each other."""
_WARPS_OF_A_GROUP = 4
"""An HGMMA is one operation of four warps, each of which issues it."""
_LOAD = re.compile(r"LDG\b|global_load_(?!lds)|buffer_load")
_MATRIX_SHAPE = re.compile(r"(?:HGMMA\.|mfma_f32_)(\d+)x(\d+)x(\d+)")
_WARP_MATRIX = {"HMMA.1688": 16 * 8 * 8, "HMMA.16816": 16 * 8 * 16}


@dataclass(frozen=True)
class Part:
    """A stretch of a program: a loop's body, or what is around it. `macs`: in units of bf16 multiply-adds, per warp."""

    instructions: int
    barriers: int
    matrix_waits: int
    loads: int
    macs: float

    @staticmethod
    def of(instructions: Sequence[Instruction]) -> Part:
        """What is counted in compiled code."""
        opcodes = [instruction.opcode for instruction in instructions]
        return Part(
            len(opcodes),
            sum(name.startswith(("BAR.SYNC", "s_barrier")) for name in opcodes),
            sum(name.startswith("WARPGROUP.DEPBAR") for name in opcodes),
            sum(_LOAD.match(name) is not None for name in opcodes),
            sum(_macs(name) for name in opcodes),
        )

    def without(self, other: Part) -> Part:
        """The rest of a program, of which `other` is a stretch. A program waits for memory outside of loops too."""
        return Part(
            self.instructions - other.instructions,
            self.barriers - other.barriers,
            self.matrix_waits - other.matrix_waits,
            max(1, self.loads - other.loads),
            self.macs - other.macs,
        )


@dataclass(frozen=True)
class Counts:
    """A compiled kernel. `loop` is its inner loop's body, None without one."""

    registers: int
    shared_bytes: int
    rest: Part
    loop: Part | None


_counts: dict[Hashable, Counts] = {}


def counts(launch: Launch, plan: Plan, family: str) -> Counts:
    """What `launch` compiles to for `family`; kept, since panels of one layer compile to the same."""
    key = (
        family,
        launch.kernel.fn,
        plan.constants,
        plan.num_warps,
        plan.num_stages,
        *[each.dtype for each in launch.matrices],
    )
    if key not in _counts:
        compiled = compile_launch(launch, family)
        instructions, resources = disassemble(compiled)
        whole, body = Part.of(instructions), inner_loop(instructions)
        loop = None if body is None or launch.kernel.fn.__name__ == "effective_weight_kernel" else Part.of(body)
        rest = whole if loop is None else whole.without(loop)
        _counts[key] = Counts(resources.registers, compiled.metadata.shared, rest, loop)
    return _counts[key]


def seconds(launch: Launch, chip: Chip) -> float:
    """The predicted time of one launch."""
    plan = launch.plan()
    kernel = counts(launch, plan, chip.family)
    resident, programs, trips = residents(kernel, plan, chip), math.prod(plan.grid), loop_trips(launch, plan, kernel)
    waves, rest = divmod(programs, resident * chip.units)
    cycles = waves * _wave_cycles(kernel, plan.num_warps, trips, resident, chip)
    if rest:
        cycles += _wave_cycles(kernel, plan.num_warps, trips, ceil_div(rest, chip.units), chip)
    return chip.launch_seconds + max(cycles / chip.clock, *memory_seconds(launch, plan, chip))


def residents(kernel: Counts, plan: Plan, chip: Chip) -> int:
    """Programs of a kernel that a unit holds at a time."""
    return programs_that_fit(kernel.registers, kernel.shared_bytes, plan.num_warps, chip)


def programs_that_fit(registers: int, shared_bytes: int, warps: int, chip: Chip) -> int:
    """The same from the kernel's needs: `registers` a thread, `shared_bytes` and `warps` a program."""
    by_registers = chip.registers // (ceil_div(registers, 8) * 8 * warps * chip.warp_size)
    by_shared = chip.shared_bytes // max(1, shared_bytes + 1024)
    return max(1, min(by_registers, by_shared, 64 // warps, 32))


def loop_trips(launch: Launch, plan: Plan, kernel: Counts) -> int:
    """How often a program runs its inner loop, which the compiler may have unrolled."""
    T: Any = plan.constants
    name = launch.kernel.fn.__name__
    if name == "weight_product_kernel":
        split_length = next(each for each in launch.others if isinstance(each, int))
        return ceil_div(split_length, T.block_rows if T.transposed else T.block_columns)
    if name == "token_product_kernel":
        return ceil_div(launch.matrices[1].shape[0], T.block_tokens)
    if name == "factor_gradients_kernel":
        return ceil_div(ceil_div(launch.matrices[0].shape[1], T.block_columns), plan.grid[1])
    if name == "add_partials_kernel":
        assert kernel.loop is not None
        return ceil_div(max(launch.others[2], launch.others[4]), kernel.loop.loads)  # a thread loads once for each part
    return 1


def _wave_cycles(kernel: Counts, warps: int, trips: int, resident: int, chip: Chip) -> float:
    cycles = part_cycles(kernel.rest, warps, resident, chip)
    return cycles + (trips * part_cycles(kernel.loop, warps, resident, chip) if kernel.loop else 0.0)


def part_cycles(part: Part, warps: int, resident: int, chip: Chip) -> float:
    """Cycles in which every one of a unit's `resident` programs gets through `part`.

    They share issue slots and matrix units, and hide each other's waits as far as these leave room.
    """
    issue = part.instructions * warps / _SCHEDULERS * chip.cycles_per_instruction
    alone = max(issue, part.instructions * chip.cycles_per_instruction / _LONE_ISSUE_RATE)
    matrix = part.macs * warps / chip.macs_per_cycle
    waits = (
        part.barriers * _BARRIER_CYCLES + part.matrix_waits * _MATRIX_WAIT_CYCLES + bool(part.loads) * _MEMORY_CYCLES
    )
    return max(resident * issue, resident * matrix, alone + matrix + waits)


def memory_seconds(launch: Launch, plan: Plan, chip: Chip) -> tuple[float, float]:
    """(device memory, cache): every matrix once, and what programs read and write in all.

    H and partial sums that fit in the cache were written there and are not charged to device memory.
    """
    T: Any = plan.constants
    name = launch.kernel.fn.__name__
    first, second = launch.matrices[0].nbytes, launch.matrices[1].nbytes
    if name == "weight_product_kernel":
        weight = launch.matrices[2].nbytes
        columns = T.block_columns if T.transposed else T.block_rows
        return (
            (first * plan.grid[1] + second + weight) / chip.bytes_per_second,
            (
                weight * ceil_div(launch.matrices[0].shape[0], T.block_tokens)
                + second * ceil_div(launch.matrices[0].shape[1], columns)
            )
            / chip.cache_bytes_per_second,
        )
    if name == "token_product_kernel":
        rows, columns = launch.matrices[0].shape[0], launch.matrices[1].shape[1]
        traffic = first * ceil_div(columns, T.block_columns) + second * ceil_div(rows, T.block_rows)
        return (first + second) / chip.bytes_per_second, traffic / chip.cache_bytes_per_second
    if name == "effective_weight_kernel":
        return (first + second) / chip.bytes_per_second, 0.0
    tensors = (*launch.matrices, *(each for each in launch.others if hasattr(each, "nbytes")))
    traffic = sum(each.nbytes for each in tensors)
    beyond = 0.0 if traffic <= chip.cache_bytes else traffic / chip.bytes_per_second
    return beyond, traffic / chip.cache_bytes_per_second


def _macs(opcode: str) -> float:
    """Multiply-adds of one warp's instruction, those of TF32 and fp32 operands counted by the time they take."""
    macs: float
    if match := _MATRIX_SHAPE.search(opcode):
        macs = math.prod(int(size) for size in match.groups())
        macs = macs / _WARPS_OF_A_GROUP if opcode.startswith("HGMMA") else macs
    else:
        macs = next((size for name, size in _WARP_MATRIX.items() if opcode.startswith(name)), 0)
    wide = 2 if "TF32" in opcode else 8 if opcode.endswith("f32") or "_f32_e" in opcode else 1
    return macs * wide
