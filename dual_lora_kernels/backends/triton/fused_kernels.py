"""Kernels that rebuild W inside the matrix product: Y or ∂X, and H with the factor gradients as its epilogue."""

# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .panel_kernels import contribute, store_up
from .tiles import dot, effective_tile, factor_products, load_factor, narrow


@triton.jit
def weight_product_kernel(
    out, input, weight, A, B, C, D, scale, bias, row_hashes, column_hashes,
    tokens, rows, columns, r1, r2, split_length,
    out_split_stride, out_token_stride, input_token_stride, input_stride, weight_row_stride, weight_column_stride,
    A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
    C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_SECOND: tl.constexpr,
    BLOCK_R1: tl.constexpr, SLICES_1: tl.constexpr, MASK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr, SLICES_2: tl.constexpr, MASK_R2: tl.constexpr,
    MASK_TOKENS: tl.constexpr, MASK_FIRST: tl.constexpr, MASK_SECOND: tl.constexpr, WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, DITHER: tl.constexpr,
    ACCUMULATOR: tl.constexpr, COMPUTE: tl.constexpr, PRODUCT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, CANONICAL_NAN: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """Y = X Wᵀ + b, or ∂X = G W where ``TRANSPOSED``, with W [rows, columns] rebuilt tile by tile.

    Out [tokens, first], input [tokens, second]: first is the weight's axis that stays (rows in the forward pass),
    second the one that is summed. Program (i, j) takes tile i, tokens fastest, and part j of the sum, `split_length`
    long. W's tile is built as W lies in memory and is the right operand, through shared memory, in both passes. Built
    transposed for ∂X it took 15 % more instructions on sm_90 and twice as many on gfx942; as the left operand, from
    registers, the forward pass took twice as many on gfx942 and within 4 % of the same on sm_90.
    """
    BLOCK_ROWS: tl.constexpr = BLOCK_SECOND if TRANSPOSED else BLOCK_FIRST
    BLOCK_COLUMNS: tl.constexpr = BLOCK_FIRST if TRANSPOSED else BLOCK_SECOND
    MASK_ROWS: tl.constexpr = MASK_SECOND if TRANSPOSED else MASK_FIRST
    MASK_COLUMNS: tl.constexpr = MASK_FIRST if TRANSPOSED else MASK_SECOND
    first_count = columns if TRANSPOSED else rows
    second_count = rows if TRANSPOSED else columns
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    token = tl.program_id(0) % token_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first = tl.program_id(0) // token_tiles * BLOCK_FIRST + tl.arange(0, BLOCK_FIRST)
    start = tl.program_id(1) * split_length
    stop = tl.minimum(start + split_length, second_count)
    if WIDE:
        first, token = first.to(tl.int64), token.to(tl.int64)
    s = tl.load(scale).to(COMPUTE)
    accumulator = tl.zeros((BLOCK_TOKENS, BLOCK_FIRST), dtype=PRODUCT)
    for position in range(start, stop, BLOCK_SECOND):
        second = position + tl.arange(0, BLOCK_SECOND)
        if WIDE:
            second = second.to(tl.int64)
        x = load_factor(
            input, token, second, tokens, stop, input_token_stride, input_stride, MASK_TOKENS, MASK_SECOND
        )
        row, column = first, second
        row_stop, column_stop = first_count, stop
        if TRANSPOSED:
            row, column = second, first
            row_stop, column_stop = stop, first_count
        tile = effective_tile(
            weight, A, B, C, D, s, row_hashes, column_hashes, row, column, row_stop, column_stop, r1, r2,
            weight_row_stride, weight_column_stride, A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
            C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_R1, SLICES_1, MASK_R1, BLOCK_R2, SLICES_2, MASK_R2,
            MASK_ROWS, MASK_COLUMNS, HAS_WEIGHT, DITHER,
            input.dtype.element_ty, ACCUMULATOR, COMPUTE, SPLIT, CANONICAL_NAN, INTERPRETED,
        )
        if not TRANSPOSED:
            tile = tl.trans(tile)
        accumulator = dot(x, tile, accumulator, PRECISION, INTERPRETED)
    if HAS_BIAS:
        accumulator += tl.load(bias + first, mask=first < first_count, other=0.0).to(PRODUCT)[None, :]
    out += tl.program_id(1).to(tl.int64) * out_split_stride
    pointers = out + token.to(tl.int64)[:, None] * out_token_stride + first[None, :]
    inside = (token < tokens)[:, None] & (first < first_count)[None, :]
    tl.store(pointers, narrow(accumulator, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def token_product_kernel(
    grad, input, A, B, C, D, scale, up_partials, down_partials,
    tokens, rows, columns, r1, r2,
    grad_token_stride, grad_row_stride, input_token_stride, input_column_stride,
    A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
    C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_R1: tl.constexpr, SLICES_1: tl.constexpr, MASK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr, SLICES_2: tl.constexpr, MASK_R2: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, MASK_TOKENS: tl.constexpr, WIDE: tl.constexpr,
    STE: tl.constexpr, CLIP_BOUND: tl.constexpr, WANT_MAGNITUDE: tl.constexpr, WANT_DIRECTION: tl.constexpr,
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
    if MASK_ROWS or MASK_COLUMNS:  # an infinity times a line that was not there is a NaN, which would spread
        h = tl.where((row < rows)[:, None] & (column < columns)[None, :], h, 0.0)
    p, q = factor_products(
        A, B, C, D, row, column, rows, columns, r1, r2,
        A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
        C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_R1, SLICES_1, MASK_R1, BLOCK_R2, SLICES_2, MASK_R2,
        MASK_ROWS, MASK_COLUMNS, ACCUMULATOR, SPLIT, INTERPRETED,
    )
    gradient_B = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=PRODUCT)
    gradient_D = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=PRODUCT)
    gradient_B, gradient_D = contribute(
        h, p.to(PRODUCT), q.to(PRODUCT), tl.load(scale).to(PRODUCT),
        A, B, C, D, row, column, rows, columns, r1, r2, ranks,
        A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
        C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
        gradient_B, gradient_D, down_partials + row_tile.to(tl.int64) * (r1 + r2) * columns,
        MASK_ROWS, MASK_COLUMNS, STE, CLIP_BOUND, WANT_MAGNITUDE, WANT_DIRECTION, PRECISION, INTERPRETED,
    )
    store_up(
        up_partials + column_tile.to(tl.int64) * rows * (r1 + r2), gradient_B, gradient_D,
        row, rows, r1, r2, ranks, WANT_MAGNITUDE, WANT_DIRECTION,
    )
