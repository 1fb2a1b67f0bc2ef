"""The three large products, by the vendor's library, in a dtype that the device multiplies fast.

A processor without units for a 16-bit dtype multiplies it in a loop that nobody tuned: for 512 tokens, G W of 4096 ×
4096 took 55 s in fp16 on an AMD EPYC (Zen 4), where fp32 takes 0.09. There W is kept as fp32 numbers on the 16-bit
grid, and operands are cast to fp32 a chunk at a time: the same numbers are multiplied, and accumulated in fp32.
"""

from __future__ import annotations

from functools import cache

import torch

from .panel_split import split
from .precision import accumulation_dtype

_HALVES = (torch.bfloat16, torch.float16)


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which operands of `dtype` are multiplied: their own, or fp32 where the processor is slow in it."""
    if device_type != "cpu" or dtype not in _HALVES or _has_units(dtype):
        return dtype
    return torch.float32


@cache
def token_product_dtype(
    dtype: torch.dtype, factor_dtype: torch.dtype, device_type: str, may_be_rounded: bool
) -> torch.dtype:
    """The dtype of H = Gᵀ X from operands of `dtype`: what the factors' gradients accumulate in, or, rounded, `dtype`.

    CPUs' products of 16-bit operands have no fp32 result. Casting the operands took twice the product's time, so where
    H may be rounded, it is: once, as in autograd through a plain implementation in that dtype.
    """
    wide = accumulation_dtype(torch.promote_types(dtype, factor_dtype))
    is_rounded = may_be_rounded and device_type == "cpu" and wide == torch.float32
    return product_dtype(dtype, device_type) if is_rounded else wide


def token_product_reaches(dtype: torch.dtype, h_dtype: torch.dtype, device_type: str) -> bool:
    """Whether a product of two operands of `dtype` can be written as `h_dtype`, with no rounding or cast before it."""
    return dtype == h_dtype or (device_type == "cuda" and h_dtype == torch.float32)


def weight_product(
    x: torch.Tensor, panel: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, cast_budget: int
) -> None:
    """out [M, n] = x [M, k] panel [k, n] + bias; `x` is cast to the panel's dtype in chunks of `cast_budget` bytes."""
    if x.dtype == panel.dtype:
        _multiply(x, panel, bias, out)
        return
    bias = None if bias is None else bias.to(panel.dtype)
    for start, stop in split(x.shape[0], (x.shape[1] + out.shape[1]) * panel.itemsize, cast_budget):
        chunk = x[start:stop].to(panel.dtype)
        out[start:stop] = chunk @ panel if bias is None else torch.addmm(bias, chunk, panel)


def _multiply(x: torch.Tensor, panel: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, panel, out=out)
    else:
        torch.addmm(bias, x, panel, out=out)


def token_product(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, cast_budget: int) -> None:
    """out [n, k] = gradᵀ [n, M] x [M, k], accumulated in fp32 (fp64) and written in `out`'s dtype."""
    if x.dtype == out.dtype:
        torch.mm(grad.t(), x, out=out)
    elif token_product_reaches(x.dtype, out.dtype, x.device.type):
        torch.ops.aten.mm.dtype_out(grad.t(), x, out.dtype, out=out)
    else:
        out.zero_()
        for start, stop in split(x.shape[0], (grad.shape[1] + x.shape[1]) * out.itemsize, cast_budget):
            out.addmm_(grad[start:stop].t().to(out.dtype), x[start:stop].to(out.dtype))


def _has_units(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products on this CPU run on units for `dtype`.

    oneDNN's answer covers settings such as ONEDNN_MAX_CPU_ISA; on x86 it also says yes where AVX-512 emulates bf16.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[attr-defined]
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    x86 = torch.cpu._is_avx2_supported()
    units = not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(units and torch.ops.mkldnn._is_mkldnn_bf16_supported())
