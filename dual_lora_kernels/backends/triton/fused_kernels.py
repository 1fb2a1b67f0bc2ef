"""Kernels that rebuild W inside the matrix product: Y or ∂X, and H with the factor gradients as its epilogue."""

# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .panel_kernels import contribute, store_up
from .tiles import dot, factor_product, load_factor, narrow, round_tile, weight_tile


@triton.jit
def weight_product_kernel(
    out, input, weight, magnitude_first, magnitude_second, direction_first, direction_second,
    scale, bias, first_hashes, second_hashes,
    tokens, first_count, second_count, r1, r2, split_length,
    out_split_stride, out_token_stride, input_token_stride, input_stride, weight_first_stride, weight_second_stride,
    magnitude_first_stride, magnitude_first_rank_stride, magnitude_second_rank_stride, magnitude_second_stride,
    direction_first_stride, direction_first_rank_stride, direction_second_rank_stride, direction_second_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_SECOND: tl.constexpr,
    BLOCK_R1: tl.constexpr, SLICES_1: tl.constexpr, MASK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr, SLICES_2: tl.constexpr, MASK_R2: tl.constexpr,
    MASK_TOKENS: tl.constexpr, MASK_FIRST: tl.constexpr, MASK_SECOND: tl.constexpr, WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, DITHER: tl.constexpr,
    ACCUMULATOR: tl.constexpr, COMPUTE: tl.constexpr, PRODUCT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, CANONICAL_NAN: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """out [tokens, first] = input [tokens, second] · Wᵀ, W [first, second] rebuilt tile by tile.

    Forward: first = out_features, second = in_features, out = Y. ``TRANSPOSED``, ∂X: first = in_features, second =
    out_features, so every tile of W is built transposed. The tile is the left operand of the product, straight from
    registers. Program (i, j) takes tile i, tokens fastest, and part j of the sum over second, `split_length` long.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    token = tl.program_id(0) % token_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first = tl.program_id(0) // token_tiles * BLOCK_FIRST + tl.arange(0, BLOCK_FIRST)
    start = tl.program_id(1) * split_length
    stop = tl.minimum(start + split_length, second_count)
    if WIDE:
        first, token = first.to(tl.int64), token.to(tl.int64)
    s = tl.load(scale).to(COMPUTE)
    first_hash = first
    if DITHER:
        first_hash = tl.load(first_hashes + first)  # both vectors are longer than any tile reaches
    accumulator = tl.zeros((BLOCK_FIRST, BLOCK_TOKENS), dtype=PRODUCT)
    for position in range(start, stop, BLOCK_SECOND):
        second = position + tl.arange(0, BLOCK_SECOND)
        second_hash = second
        if DITHER:
            second_hash = tl.load(second_hashes + second)
        if WIDE:
            second = second.to(tl.int64)
        base = tl.zeros((BLOCK_FIRST, BLOCK_SECOND), dtype=COMPUTE)
        if HAS_WEIGHT:
            base = load_factor(
                weight, first, second, first_count, stop, weight_first_stride, weight_second_stride,
                MASK_FIRST, MASK_SECOND,
            )
        x = load_factor(
            input, second, token, stop, tokens, input_stride, input_token_stride, MASK_SECOND, MASK_TOKENS
        )
        p = factor_product(
            magnitude_first, magnitude_second, first, second, first_count, stop, r1,
            magnitude_first_stride, magnitude_first_rank_stride, magnitude_second_rank_stride, magnitude_second_stride,
            BLOCK_FIRST, BLOCK_SECOND, BLOCK_R1, SLICES_1, MASK_FIRST, MASK_SECOND, MASK_R1,
            ACCUMULATOR, SPLIT, TRANSPOSED, INTERPRETED,
        )
        q = factor_product(
            direction_first, direction_second, first, second, first_count, stop, r2,
            direction_first_stride, direction_first_rank_stride, direction_second_rank_stride, direction_second_stride,
            BLOCK_FIRST, BLOCK_SECOND, BLOCK_R2, SLICES_2, MASK_FIRST, MASK_SECOND, MASK_R2,
            ACCUMULATOR, SPLIT, TRANSPOSED, INTERPRETED,
        )
        total = weight_tile(base, p.to(COMPUTE), q.to(COMPUTE), s, HAS_WEIGHT)
        tile = round_tile(total, first_hash, second_hash, input.dtype.element_ty, DITHER, CANONICAL_NAN, INTERPRETED)
        accumulator = dot(tile, x, accumulator, PRECISION, INTERPRETED)
    if HAS_BIAS:
        accumulator += tl.load(bias + first, mask=first < first_count, other=0.0).to(PRODUCT)[:, None]
    out += tl.program_id(1).to(tl.int64) * out_split_stride
    pointers = out + token.to(tl.int64)[None, :] * out_token_stride + first[:, None]
    inside = (first < first_count)[:, None] & (token < tokens)[None, :]
    tl.store(pointers, narrow(accumulator, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def token_product_kernel(
    grad, input, A, B, C, D, scale, up_partials, down_partials, clip_bound,
    tokens, rows, columns, r1, r2,
    grad_token_stride, grad_row_stride, input_token_stride, input_column_stride,
    A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
    C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_R1: tl.constexpr, SLICES_1: tl.constexpr, MASK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr, SLICES_2: tl.constexpr, MASK_R2: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, MASK_TOKENS: tl.constexpr, WIDE: tl.constexpr,
    STE: tl.constexpr, WANT_MAGNITUDE: tl.constexpr, WANT_DIRECTION: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRODUCT: tl.constexpr, SPLIT: tl.constexpr,
    PRODUCT_PRECISION: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """Partial factor gradients from G [tokens, rows] and X [tokens, columns]: H = Gᵀ X stays in registers.

    Program (i, j) sums one tile of H over all tokens, as the clipping estimator needs, then contracts it as
    `factor_gradients_kernel` does. Ranks of at most one slice. Partials: up [column tiles, rows, r1 + r2], down
    [row tiles, r1 + r2, columns].
    """
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    ranks = tl.arange(0, BLOCK_RANK)
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    h = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=PRODUCT)
    for position in range(0, tokens, BLOCK_TOKENS):
        token = position + tl.arange(0, BLOCK_TOKENS)
        if WIDE:
            token = token.to(tl.int64)
        g = load_factor(grad, row, token, rows, tokens, grad_row_stride, grad_token_stride, MASK_ROWS, MASK_TOKENS)
        x = load_factor(
            input, token, column, tokens, columns, input_token_stride, input_column_stride, MASK_TOKENS, MASK_COLUMNS
        )
        h = dot(g, x, h, PRODUCT_PRECISION, INTERPRETED)
    p = factor_product(
        B, A, row, column, rows, columns, r1, B_row_stride, B_rank_stride, A_rank_stride, A_column_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_R1, SLICES_1, MASK_ROWS, MASK_COLUMNS, MASK_R1,
        ACCUMULATOR, SPLIT, False, INTERPRETED,
    )
    q = factor_product(
        D, C, row, column, rows, columns, r2, D_row_stride, D_rank_stride, C_rank_stride, C_column_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_R2, SLICES_2, MASK_ROWS, MASK_COLUMNS, MASK_R2,
        ACCUMULATOR, SPLIT, False, INTERPRETED,
    )
    gradient_B = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=PRODUCT)
    gradient_D = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=PRODUCT)
    gradient_B, gradient_D = contribute(
        h, p.to(PRODUCT), q.to(PRODUCT), tl.load(scale).to(PRODUCT), clip_bound,
        A, B, C, D, row, column, rows, columns, r1, r2, ranks,
        A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
        C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
        gradient_B, gradient_D, down_partials + row_tile.to(tl.int64) * (r1 + r2) * columns,
        MASK_ROWS, MASK_COLUMNS, STE, WANT_MAGNITUDE, WANT_DIRECTION, PRECISION, INTERPRETED,
    )
    store_up(
        up_partials + column_tile.to(tl.int64) * rows * (r1 + r2), gradient_B, gradient_D,
        row, rows, r1, r2, ranks, WANT_MAGNITUDE, WANT_DIRECTION,
    )
