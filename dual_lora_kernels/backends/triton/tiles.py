"""The formula on one tile, for every kernel: products of factors, W = round(W0 + ΔW), and the products' gradients.

A tile of W, P, Q or H is [rows, columns] as the whole matrix is: rows are out_features, columns in_features. ``T`` is a
kernel's `arguments.Constants`; a matrix is an `arguments.Matrix`, and `factors` are A, B, C, D as such.
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
def rank_product(up, down, accumulator, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr):
    """accumulator + up [rows, r] down [r, columns], to fp32 accuracy: never TF32-rounded, or Q's sign would be noise.

    ``SPLIT``: three TF32 products of split fp32 operands, on tensor cores, to 2⁻²² (the fourth is left out). Otherwise
    one product: exact for bf16 and fp16 factors, fp32 fused multiply-adds for fp32 ones.
    """
    if SPLIT:
        up_high, up_low = _split(up)
        down_high, down_low = _split(down)
        accumulator = dot(up_low, down_high, accumulator, "tf32", INTERPRETED)
        accumulator = dot(up_high, down_low, accumulator, "tf32", INTERPRETED)
        return dot(up_high, down_high, accumulator, "tf32", INTERPRETED)
    return dot(up, down, accumulator, "ieee", INTERPRETED)


@triton.jit
def load(matrix, row, column, row_stop, column_stop, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile of a matrix, zero from `row_stop` and `column_stop` on where they are masked.

    The ends are arguments, and not the matrix's own, so that tiles of several matrices share their masks.
    """
    pointers = matrix.pointer + row[:, None] * matrix.row_stride + column[None, :] * matrix.column_stride
    if MASK_ROWS and MASK_COLUMNS:
        inside = (row < row_stop)[:, None] & (column < column_stop)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=(row < row_stop)[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=(column < column_stop)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def factor_product(
    up, down, row, column, shape,
    BLOCK: tl.constexpr, SLICES: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """P or Q on a tile: the factors' lines loaded and multiplied, over slices of ``BLOCK`` ranks in a fixed order."""
    ROWS: tl.constexpr = T.block_rows
    COLUMNS: tl.constexpr = T.block_columns
    product = tl.zeros((ROWS, COLUMNS), dtype=T.accumulator)
    for index in tl.static_range(SLICES):
        ranks = index * BLOCK + tl.arange(0, BLOCK)
        up_tile = load(up, row, ranks, shape[0], down.rows, T.mask_rows, MASKED)
        down_tile = load(down, ranks, column, down.rows, shape[1], MASKED, T.mask_columns)
        product = rank_product(up_tile, down_tile, product, T.split_fp32, T.interpreted)
    return product


@triton.jit
def factor_products(factors, row, column, shape, T: tl.constexpr):
    """(P, Q) on the tile at `row` × `column` of a block of `shape`, (rows, columns)."""
    A, B, C, D = factors
    p = factor_product(B, A, row, column, shape, T.block_r1, T.slices_r1, T.mask_r1, T)
    q = factor_product(D, C, row, column, shape, T.block_r2, T.slices_r2, T.mask_r2, T)
    return p, q


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
            nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
            # Selected as bits: Triton 3.6's interpreter keeps bf16 as integers, of which a NaN would make a number.
            return tl.where(values != values, tl.full(nearest.shape, 0x7FC0, tl.uint16), nearest).to(
                tl.bfloat16, bitcast=True
            )
    return values.to(DTYPE)


@triton.jit
def round_tile(
    values, row_hashes, column_hashes,
    DTYPE: tl.constexpr, DITHER: tl.constexpr, CANONICAL_NAN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`rounding.round_to` on a tile. The dither's field is the outer product of its hash vectors, wrapping int32."""
    if DITHER:
        field = tl.mul(row_hashes[:, None], column_hashes[None, :], sanitize_overflow=False).to(tl.uint32, bitcast=True)
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        # The addition must not carry a NaN over into a number. Clearing the low bits of NaNs that start 0x7FFF, as
        # NVIDIA makes them, takes one integer minimum; a comparison and a selection took two and unpacked pairs.
        bits = tl.minimum(bits, 0x7FFF0000).to(tl.uint32, bitcast=True)
        if not CANONICAL_NAN:
            bits = tl.minimum(bits, 0xFFFF0000)  # negative ones, which keep their payload elsewhere
        if DTYPE == tl.bfloat16:
            rounded = ((bits + (field >> 16)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            rounded = ((bits + (field >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        rounded = narrow(values, DTYPE, INTERPRETED)
    return rounded


@triton.jit
def _absmax(weight, block, T: tl.constexpr):
    absmax = tl.load(weight.absmax + block)
    if T.nested_shift:
        nested = tl.load(weight.nested_absmax + (block >> T.nested_shift))
        absmax = tl.load(weight.nested_table + absmax.to(tl.int32)) * nested + tl.load(weight.offset)
    return absmax


@triton.jit
def four_bit_tile(weight, row, first_column, row_stop, column_stop, T: tl.constexpr):
    """W0 on a tile, from an `arguments.FourBitMatrix`; zero from `row_stop` and `column_stop` on where masked.

    Both elements of a byte are of one row and of one block. The table and the absmax are read from memory, where they
    stay in the L1 cache: selecting among sixteen registers took fifteen instructions an element.
    """
    pair = first_column // 2 + tl.arange(0, T.block_columns // 2)
    inside_rows, inside_columns = row < row_stop, 2 * pair < column_stop
    has_second = 2 * pair + 1 < column_stop
    if T.mask_rows:
        row = tl.where(inside_rows, row, 0)
    if T.mask_columns:
        pair = tl.where(inside_columns, pair, 0)
    line = weight.first + row * weight.row_length
    # Bytes are numbered by sums of which the compiler sees that neighbours are neighbours: it loads several at a time.
    codes = tl.load(weight.packed + ((line >> 1)[:, None] + pair[None, :])).to(tl.int32)
    if T.block_in_row:
        absmax = _absmax(weight, (line + first_column) >> T.block_shift, T)[:, None]
    else:
        absmax = _absmax(weight, (line[:, None] + 2 * pair[None, :]) >> T.block_shift, T)
    first = narrow(tl.load(weight.table + (codes >> 4)) * absmax, T.base, T.interpreted)
    second = narrow(tl.load(weight.table + (codes & 15)) * absmax, T.base, T.interpreted)
    if T.mask_rows:
        first, second = tl.where(inside_rows[:, None], first, 0.0), tl.where(inside_rows[:, None], second, 0.0)
    if T.mask_columns:
        first, second = tl.where(inside_columns[None, :], first, 0.0), tl.where(has_second[None, :], second, 0.0)
    return tl.interleave(first, second)


@triton.jit
def effective_tile(
    weight, factors, hashes, scale, row, column, first_column, shape, DTYPE: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """round(W0 + ΔW) of the tile at `row` × `column`, from memory. Beyond `shape`, (rows, columns), are small numbers.

    `first_column` is that of `column`. `scale` is a value of type ``T.compute``. The two vectors of `hashes` are longer
    than any tile reaches.
    """
    p, q = factor_products(factors, row, column, shape, T)
    base = p
    if T.has_weight:
        if T.block_shift:
            base = four_bit_tile(weight, row, first_column, shape[0], shape[1], T)
        else:
            base = load(weight, row, column, shape[0], shape[1], T.mask_rows, T.mask_columns)
    total = weight_tile(base, p.to(T.compute), q.to(T.compute), scale, T.has_weight)
    row_hash, column_hash = row, column
    if T.dither:
        row_hash, column_hash = tl.load(hashes[0] + row), tl.load(hashes[1] + column)
    return round_tile(total, row_hash, column_hash, DTYPE, T.dither, T.canonical_nan, T.interpreted)


@triton.jit
def product_gradient_tiles(h, p, q, scale, T: tl.constexpr):
    """(∂P, ∂Q) on a tile from its complete H = Gᵀ X."""
    scaled = h * scale
    grad_p = tl.where(p > 0, tl.where(q > 0, scaled, -scaled), 0.0)
    grad_q = scaled * tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if T.ste == "clip":
        bound = tl.full((), T.clip_bound, grad_q.dtype)
        # Not tl.clamp: for fp64, Triton 3.9 lowers its symmetric form to an instruction that does not exist.
        grad_q = tl.minimum(grad_q, bound, propagate_nan=tl.PropagateNan.ALL)
        grad_q = tl.maximum(grad_q, -bound, propagate_nan=tl.PropagateNan.ALL)
    elif T.ste == "xnor":
        grad_q = tl.where(tl.abs(q) <= 1, grad_q, 0.0)
    return grad_p, grad_q


@triton.jit
def sum_parts(pointers, stride, parts, inside, total):
    """total + the tiles at `pointers`, `stride` apart, in their order; four loads are under way at a time."""
    for _ in range(parts // 4):
        first = tl.load(pointers, mask=inside, other=0.0)
        second = tl.load(pointers + stride, mask=inside, other=0.0)
        third = tl.load(pointers + 2 * stride, mask=inside, other=0.0)
        fourth = tl.load(pointers + 3 * stride, mask=inside, other=0.0)
        total = (((total + first) + second) + third) + fourth
        pointers += 4 * stride
    for _ in range(parts % 4):
        total += tl.load(pointers, mask=inside, other=0.0)
        pointers += stride
    return total
