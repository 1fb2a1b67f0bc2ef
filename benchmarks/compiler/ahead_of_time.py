"""Compiles a kernel launch for any chip, without that chip: what Triton's just-in-time compiler would build there."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from dual_lora_kernels.backends.triton.launch import Launch


def target(family: str) -> GPUTarget:
    """The compiler's target of a family such as ``"sm_90"`` or ``"gfx942"``."""
    if family.startswith("sm_"):
        return GPUTarget("cuda", int(family.removeprefix("sm_")), 32)
    return GPUTarget("hip", family, 64 if family.startswith("gfx9") else 32)


def compile_launch(launch: Launch, family: str) -> CompiledKernel:
    """`launch`, whose tensors may be on the meta device, compiled for `family`.

    Triton's own binder specialises the arguments, as in a launch: ones become constants, multiples of 16 and aligned
    pointers are known to be such.
    """
    kernel, plan, chip = launch.kernel, launch.plan(), target(family)
    backend = make_backend(chip)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = binder(*launch.arguments, plan.constants, **plan.options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, plan.options, bound, specialization, given)
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_source(source, target=chip, options=parsed.__dict__)
