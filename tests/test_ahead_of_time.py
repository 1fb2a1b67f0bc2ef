"""Every kernel compiles for real chips in the combinations that people use, not only in the benchmark's round numbers.

A size of one becomes a constant in Triton, others need masks, wide offsets or rank slices: each takes another way
through the kernels, which the interpreter does not distinguish.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.compiler.ahead_of_time import compile_launch
from benchmarks.compiler.static_report import SHARED_LIMIT_KIB
from dual_lora_kernels.backends import Block, Estimator, Factors, ParameterGradients, base_of
from dual_lora_kernels.backends.triton import launches
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.arguments import Hashes
from dual_lora_kernels.backends.triton.launch import Launch

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches(
    family: str,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
) -> Iterator[Launch]:
    """The kernels for M, N, K, r1, r2 = `sizes`, with a bias, splits and estimators; fused ones where they run."""
    m, n, k, r1, r2 = sizes
    chip = Architecture(family, 132)
    shapes = chip.shapes(dtype.itemsize)
    wide = FP64 if FP64 in (dtype, factor_dtype) else FP32
    x, grad = _meta(m, k, dtype=dtype), _meta(m, n, dtype=dtype)
    weight = None if weight_dtype is None else _meta(n, k, dtype=weight_dtype)
    up, down = (_meta(4, 4, 4, dtype=wide) for _ in range(2))
    factors = Factors(
        _meta(r1, k, dtype=factor_dtype), _meta(n, r1, dtype=factor_dtype),
        _meta(r2, k, dtype=factor_dtype), _meta(n, r2, dtype=factor_dtype), _meta(dtype=FP32),
    )  # fmt: skip
    gradients, partials = ParameterGradients(*factors[:4]), (up, down)
    block = Block(base_of(weight), factors, "dither", dtype, 3, 5)
    hashes = Hashes(_meta(8, dtype=torch.int32), _meta(8, dtype=torch.int32))
    yield launches.effective_weight(_meta(n, k, dtype=dtype), block, hashes, shapes.effective_weight, chip)
    yield launches.factor_gradients(
        _meta(n, k, dtype=wide), block, Estimator("xnor", 1.0), gradients, partials, shapes.factor_gradients, chip
    )
    if max(r1, r2) <= shapes.fused_rank and (factor_dtype == FP64) == (dtype == FP64):
        shape = shapes.weight_product("forward", m, n, k)
        out, bias = _meta(m, n, dtype=dtype), _meta(n, dtype=dtype)
        yield launches.weight_product("forward", out, x, block, bias, hashes, shape, chip)
        shape = shapes.weight_product("input_gradient", m, k, n)
        out, split = (
            _meta(m, k, dtype=dtype),
            launches.SplitSum(_meta(2, m, k, dtype=wide), _meta(8, dtype=torch.int32)),
        )
        nearest = block._replace(rounding="nearest")
        yield launches.weight_product("input_gradient", out, grad, nearest, None, hashes, shape, chip, split)
        estimator = Estimator("clip", 1.0)
        yield launches.token_product(grad, x, block, estimator, gradients, partials, shapes.token_product, chip)


@pytest.mark.parametrize(
    ("family", "sizes", "dtype", "factor_dtype", "weight_dtype"),
    [
        ("sm_90", (1, 1, 1, 1, 1), BF16, FP32, BF16),
        ("sm_90", (33, 100, 70, 5, 32), BF16, FP32, BF16),
        ("sm_89", (33, 100, 70, 130, 40), BF16, FP32, BF16),
        ("sm_90", (300, 2**17, 2**15 + 1, 16, 16), FP16, BF16, FP32),
        ("sm_90", (8, 64, 64, 16, 16), FP32, FP32, None),
        ("sm_90", (300, 100, 70, 16, 16), BF16, FP64, BF16),
        ("gfx942", (300, 100, 70, 16, 16), FP16, FP64, FP16),
        ("sm_90", (8, 64, 64, 16, 16), FP64, FP64, BF16),
        ("gfx942", (1, 100, 70, 1, 20), BF16, FP32, None),
        ("gfx942", (300, 2**17, 2**15 + 1, 16, 16), FP16, FP16, FP32),
        ("gfx1100", (7, 100, 70, 5, 12), BF16, FP32, BF16),
    ],
    ids=str,
)
def test_all_kernels_compile(
    family: str,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
) -> None:
    binary = "cubin" if family.startswith("sm_") else "hsaco"
    for launch in _launches(family, sizes, dtype, factor_dtype, weight_dtype):
        compiled = compile_launch(launch, family)
        assert len(compiled.asm[binary]) > 0
        assert compiled.metadata.shared <= SHARED_LIMIT_KIB[family] * 1024
