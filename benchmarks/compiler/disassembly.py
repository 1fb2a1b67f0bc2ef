"""Compiled kernels as instructions: NVIDIA's SASS and AMD's assembly, parsed, classified, the inner loop found."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

CLASSES = ("matrix", "integer", "float", "conversion", "global", "shared", "other")
"""What instructions do: matrix products; integer, logic and moves; floating point; conversions, permutes and shuffles;
global memory; shared (on sm_100 also tensor) memory and copies into it; synchronisation, branches and all else."""

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)([^;]*);")
_SASS_TARGET = re.compile(r"0x([0-9a-f]+)")
_SASS_PATTERNS = {  # matched against the start of an opcode, first hit wins
    "matrix": r"[HIDQB]MMA|[HIQB]GMMA|UTC\w*MMA",
    "shared": r"LDS|STS|ATOMS|LDGSTS|LDTM|STTM|UTCCP|UTMA|UBLKCP",
    "global": r"LDG\b|STG\b|LD\b|ST\b|LDL|STL|RED\b|ATOM",
    "conversion": r"F2|I2|FRND|PRMT|UPRMT|SHFL|MOVM|REDUX",
    "float": r"U?F(ADD|MUL|FMA|MNMX|SEL|SET|CHK|SWZ)|D(ADD|MUL|FMA|MNMX|SET)|H(ADD|MUL|FMA|MNMX|SET)2|MUFU",
    "integer": (
        r"U?(IMAD|IADD3?|IABS|ISETP|IMNMX|VIMNMX|VIADD|LEA|P?LOP3|SHF|SHL|SHR|SEL|SGXT|BMSK|MOV|VIADDMNMX"
        r"|POPC|FLO|BREV|P2R|R2P)\b|CS2R|R2UR"
    ),
}
_AMD_LINE = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_[a-z0-9_]+)([^;]*)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_PATTERNS = {
    "matrix": r"v_(mfma|smfmac|wmma|swmmac)",
    "conversion": r"v_cvt|v_perm|v_permlane|ds_\w*permute|ds_swizzle|v_readlane|v_writelane|v_readfirstlane|s_cvt",
    "other": (
        r"buffer_\w*inv|buffer_wb|global_inv|global_wb"
        r"|s_(wait|barrier|nop|delay|clause|c?branch|endpgm|sendmsg|sleep|set)"
    ),
    "shared": r"ds_|global_load_lds|buffer_load_\w*lds",
    "global": r"global_|buffer_|flat_|scratch_|s_(load|buffer_load)",
    "float": r"[vs]_\w*_b?f(16|32|64)",
    "integer": r"[vs]_",
}


class Instruction(NamedTuple):
    """An opcode with its modifiers, and where it may jump: an index into the program, or None."""

    opcode: str
    target: int | None
    ends: bool = False
    """Whether it always ends the program; behind the last of these compilers put blocks they expect to run rarely."""


class Resources(NamedTuple):
    """`registers` a thread (AMD: vector registers, with accumulation registers); spilled values and their stack bytes.

    `spills`: on NVIDIA local loads and stores in the code, on AMD spilled vector and scalar registers.
    """

    registers: int
    spills: int
    stack_bytes: int


class Program(NamedTuple):
    """A compiled kernel."""

    instructions: list[Instruction]
    resources: Resources


def disassemble(compiled: Any) -> Program:
    """A kernel that Triton compiled, for either vendor."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return Program(parse_amdgcn(text), amd_resources(text))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        instructions = parse_sass(_cuobjdump("-sass", file.name))
        return Program(instructions, nvidia_resources(_cuobjdump("-res-usage", file.name), instructions))


def _cuobjdump(option: str, path: str) -> str:
    command = [str(_NVIDIA_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_sass(text: str) -> list[Instruction]:
    """The output of ``cuobjdump -sass``, without the padding behind the last jump."""
    found = [match.groups() for match in _SASS_LINE.finditer(text)]
    index_of = {int(address, 16): index for index, (address, *_) in enumerate(found)}
    program = []
    for _, predicate, opcode, operands in found:
        jump = _SASS_TARGET.search(operands) if opcode.startswith("BRA") else None
        target = index_of.get(int(jump[1], 16)) if jump else None
        program.append(Instruction(opcode, target, ends=opcode == "EXIT" and predicate is None))
    while program and (program[-1].opcode == "NOP" or program[-1].target == len(program) - 1):
        program.pop()
    return program


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions in AMD's assembly. A pair issued together (``v_dual_…``) counts as one, named by its first."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _AMD_LINE.match(line):
            found.append((match[1], match[2].strip()))
    return [
        Instruction(opcode, labels.get(operands) if "branch" in opcode else None, ends=opcode == "s_endpgm")
        for opcode, operands in found
    ]


def nvidia_resources(usage: str, instructions: Sequence[Instruction]) -> Resources:
    """From the output of ``cuobjdump -res-usage`` and the code."""
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if match is None:
        raise ValueError(f"no resource usage in {usage!r}")
    registers, stack, local = (int(group) for group in match.groups())
    return Resources(registers, spill_accesses(instructions), stack + local)


def amd_resources(text: str) -> Resources:
    """From the metadata at the end of AMD's assembly."""

    def value(name: str) -> int:
        match = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"no .{name} in the assembly's metadata")
        return int(match[1])

    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    return Resources(value("vgpr_count"), spills, value("private_segment_fixed_size"))


def classify(opcode: str) -> str:
    """One of `CLASSES`."""
    patterns = _SASS_PATTERNS if opcode[0].isupper() else _AMD_PATTERNS
    return next((name for name, pattern in patterns.items() if re.match(pattern, opcode)), "other")


def class_counts(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each class."""
    counts = Counter(classify(instruction.opcode) for instruction in instructions)
    return {name: counts[name] for name in CLASSES}


def matrix_instructions(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Matrix instructions by name, most frequent first."""
    names = Counter(item.opcode for item in instructions if classify(item.opcode) == "matrix")
    return dict(names.most_common())


def spill_accesses(instructions: Sequence[Instruction]) -> int:
    """Loads and stores of spilled registers."""
    return sum(item.opcode.startswith(("LDL", "STL", "scratch_")) for item in instructions)


def inner_loop(instructions: Sequence[Instruction]) -> list[Instruction] | None:
    """The longest loop, of those with matrix instructions if there are any, as laid out in the code; None without one.

    A jump back from behind the program's end belongs to a block that was moved out of line (a wait's retries), not to a
    loop that encloses all in between.
    """
    loops = []
    for index, instruction in enumerate(instructions):
        if instruction.target is not None and instruction.target <= index:
            body = list(instructions[instruction.target : index + 1])
            if not any(item.ends for item in body):
                loops.append(body)
    return max(loops, key=lambda body: (bool(matrix_instructions(body)), len(body)), default=None)
