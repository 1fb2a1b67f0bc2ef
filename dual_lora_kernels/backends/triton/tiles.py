"""The formula on one tile, for every kernel: products of factors, W = round(W0 + ΔW), and the products' gradients.

A tile has two axes, "first" and "second". In the forward pass they are the weight's rows and columns; for ∂X they are
its columns and rows, so that both passes build the operand of their matrix product directly in registers. Everything
here is symmetric in the two, to the bit: P and Q sum in the same order either way (``TRANSPOSED``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """accumulator + a b. Triton's interpreter multiplies bf16 operands as integers, so there they are widened first,
    which changes nothing else: products of bf16 or fp16 numbers are exact in fp32."""
    if INTERPRETED:
        a = a.to(accumulator.dtype)
        b = b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def _split(values):
    """fp32 as a sum of two TF32 numbers, the second to 2⁻²² of the first. An infinity becomes a NaN."""
    high = (values.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, values - high


@triton.jit
def rank_product(first, second, accumulator, SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr, INTERPRETED: tl.constexpr):
    """accumulator + first [F, r] second [r, S], to fp32 accuracy: never TF32-rounded, or Q's sign would be noise.

    ``SPLIT``: three TF32 products of split fp32 operands, on tensor cores, to 2⁻²² (the fourth is left out). Otherwise
    one product: exact for bf16 and fp16 factors, fp32 fused multiply-adds for fp32 ones.
    """
    if SPLIT:
        first_high, first_low = _split(first)
        second_high, second_low = _split(second)
        # In the same order for a tile and its transpose, or forward and ∂X would round P and Q differently.
        if TRANSPOSED:
            accumulator = dot(first_high, second_low, accumulator, "tf32", INTERPRETED)
            accumulator = dot(first_low, second_high, accumulator, "tf32", INTERPRETED)
        else:
            accumulator = dot(first_low, second_high, accumulator, "tf32", INTERPRETED)
            accumulator = dot(first_high, second_low, accumulator, "tf32", INTERPRETED)
        return dot(first_high, second_high, accumulator, "tf32", INTERPRETED)
    return dot(first, second, accumulator, "ieee", INTERPRETED)


@triton.jit
def load_factor(
    pointer, rows, columns, row_count, column_count, row_stride, column_stride,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a factor, zero beyond its ends where they are masked."""
    pointers = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=(rows < row_count)[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=(columns < column_count)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def factor_product(
    first_pointer, second_pointer, first_lines, second_lines, first_count, second_count, rank,
    first_stride, first_rank_stride, second_rank_stride, second_stride,
    BLOCK_FIRST: tl.constexpr, BLOCK_SECOND: tl.constexpr, BLOCK_RANK: tl.constexpr, SLICES: tl.constexpr,
    MASK_FIRST: tl.constexpr, MASK_SECOND: tl.constexpr, MASK_RANK: tl.constexpr,
    ACCUMULATOR: tl.constexpr, SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """P or Q on a tile: the factors' lines loaded and multiplied, over slices of ``BLOCK_RANK`` in a fixed order."""
    product = tl.zeros((BLOCK_FIRST, BLOCK_SECOND), dtype=ACCUMULATOR)
    for index in tl.static_range(SLICES):
        ranks = index * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        first = load_factor(
            first_pointer, first_lines, ranks, first_count, rank, first_stride, first_rank_stride, MASK_FIRST, MASK_RANK
        )
        second = load_factor(
            second_pointer, ranks, second_lines, rank, second_count, second_rank_stride, second_stride,
            MASK_RANK, MASK_SECOND,
        )  # fmt: skip
        product = rank_product(first, second, product, SPLIT, TRANSPOSED, INTERPRETED)
    return product


@triton.jit
def weight_tile(base, p, q, scale, HAS_WEIGHT: tl.constexpr):
    """W0 + ΔW before rounding, ΔW = s · max(P, 0) ⊙ sgn(Q); ΔW alone without W0. A NaN in P stays one.

    The one multiplication and the one addition are fused by name, so that every kernel rounds alike (compilers contract
    as they like otherwise; launches switch that off).
    """
    signed_scale = tl.where(q > 0, scale, -scale)
    magnitude = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_WEIGHT:
        return tl.fma(magnitude, signed_scale.to(magnitude.dtype), base.to(magnitude.dtype))
    return magnitude * signed_scale


@triton.jit
def narrow(values, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """values.to(DTYPE), to nearest. Triton's interpreter truncates to bf16, so there it is done on the bits."""
    if INTERPRETED:
        if DTYPE == tl.bfloat16:
            values = values.to(tl.float32)
            bits = values.to(tl.uint32, bitcast=True)
            nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            return tl.where(values != values, float("nan"), nearest)
    return values.to(DTYPE)


@triton.jit
def round_tile(
    values, first_hashes, second_hashes,
    DTYPE: tl.constexpr, DITHER: tl.constexpr, CANONICAL_NAN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`rounding.round_to` on a tile. The dither's field is the outer product of its hash vectors, wrapping int32."""
    if not DITHER:
        return narrow(values, DTYPE, INTERPRETED)
    values = values.to(tl.float32)
    field = (first_hashes[:, None] * second_hashes[None, :]).to(tl.uint32, bitcast=True)
    bits = values.to(tl.int32, bitcast=True)
    # The addition must not carry a NaN over into a number. Clearing the low bits of NaNs that start 0x7FFF, as NVIDIA's
    # arithmetic makes them, takes one integer minimum; a comparison and a selection would take two and unpack pairs.
    bits = tl.minimum(bits, 0x7FFF0000).to(tl.uint32, bitcast=True)
    if not CANONICAL_NAN:
        bits = tl.minimum(bits, 0xFFFF0000)  # negative ones, which keep their payload elsewhere
    if DTYPE == tl.bfloat16:
        return ((bits + (field >> 16)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return ((bits + (field >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def product_gradient_tiles(h, p, q, scale, clip_bound, STE: tl.constexpr):
    """(∂P, ∂Q) on a tile from its complete H = Gᵀ X."""
    scaled = h * scale
    grad_p = tl.where(p > 0, tl.where(q > 0, scaled, -scaled), 0.0)
    grad_q = scaled * tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if STE == "clip":
        bound = tl.full((), 0.0, grad_q.dtype) + clip_bound
        grad_q = tl.clamp(grad_q, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    elif STE == "xnor":
        grad_q = tl.where(tl.abs(q) <= 1, grad_q, 0.0)
    return grad_p, grad_q
