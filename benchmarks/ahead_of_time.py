"""Compiles a kernel launch for any chip, without that chip: what Triton's just-in-time compiler would build there."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as compile_source

from dual_lora_kernels.backends.triton.launches import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
_ALIGNMENT = 16


def target(family: str) -> GPUTarget:
    """The compiler's target of a family such as ``"sm_90"`` or ``"gfx942"``."""
    if family.startswith("sm_"):
        return GPUTarget("cuda", int(family.removeprefix("sm_")), 32)
    return GPUTarget("hip", family, 64 if family.startswith("gfx9") else 32)


def compile_launch(launch: Launch, family: str) -> CompiledKernel:
    """`launch`, whose tensors may be on the meta device, compiled for `family`.

    Arguments are specialised as a launch specialises them: ones become constants, multiples of 16 and aligned pointers
    are known to be such.
    """
    kernel = launch.kernel
    frozen = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = launch.arguments.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", _ALIGNMENT]]
            if not family.startswith("sm_") and value.untyped_storage().nbytes() < 2**31:
                attributes[(index,)].append(["tt.pointer_range", 32])  # lets AMD's compiler use buffer loads
        elif value == 1 and name not in frozen:
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            assert isinstance(value, int), name
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % _ALIGNMENT == 0 and name not in frozen:
                attributes[(index,)] = [["tt.divisibility", _ALIGNMENT]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_source(source, target=target(family), options=options)
