"""Runs the kernels: output buffers, split-K, and partial sums in a fixed order.

Only for devices that `architecture` knows; the backend has checked that.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import torch
from triton.runtime.errors import OutOfResources

from ...precision import accumulation_dtype
from ..block import Base, Block, Factors, ParameterGradients
from ..interface import DoesNotFit, Estimator, Settings
from . import launches
from .architecture import Architecture, architecture
from .device_buffers import counters, hashes
from .launch import Launch
from .shapes import ProductShape

_logger = logging.getLogger("dual_lora_kernels")
_SPLIT_COST = 2
"""What starting a program and adding its part up cost, in steps of the sum."""
_unfit: dict[tuple[object, ...], str] = {}
"""Fused kernels that their chip refused, with its reason."""


def effective_weight(out: torch.Tensor, block: Block) -> None:
    """See `Backend.effective_weight`; the block's base is in a form that the kernels read."""
    if out.numel() == 0:
        return
    (row0, col0), (rows, columns) = block.origin, block.shape
    own_hashes = hashes(out, block.rounding, row0 + rows, col0 + columns)  # whole: panels begin at many origins
    chip = _architecture(out.device)
    shape = chip.shapes(out.itemsize).effective_weight
    launches.effective_weight(out, block, own_hashes, shape, chip).run()


def factor_gradients(
    h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, budget: int
) -> None:
    """See `Backend.factor_gradients`; partial sums take at most `budget` bytes, or those of one row of tiles."""
    chip = _architecture(h.device)
    shape = chip.shapes(block.dtype.itemsize).factor_gradients
    tile, most_programs = (shape.rows, shape.columns), shape.programs_per_unit * chip.compute_units
    ranks, columns = sum(block.factors.ranks), h.shape[1]
    for start, stop in _row_groups((len(h), columns), ranks, h.itemsize, tile, budget, most_programs):
        part, own, into = h[start:stop], block.rows(start, stop), gradients.rows(start, stop)
        partials = _partials(part, (len(part), columns), ranks, tile, most_programs)
        launches.factor_gradients(part, own, estimator, into, partials, shape, chip).run()
        launches.add_partials(into, own.factors.ranks, partials).run()


def weight_product(
    operation: str, input: torch.Tensor, block: Block, bias: torch.Tensor | None, settings: Settings
) -> torch.Tensor:
    """Y of ``"forward"``, ∂X of ``"input_gradient"``: [tokens, features] in the input's dtype."""
    out_features, in_features = block.shape
    tokens, features = input.shape[0], in_features if operation == "input_gradient" else out_features
    if tokens == 0:
        return input.new_empty(0, features)
    chip = _architecture(input.device)
    shape = chip.shapes(input.itemsize).weight_product(operation, tokens, features, input.shape[1])
    wide = accumulation_dtype(input.dtype)
    most = settings.workspace // (tokens * features * wide.itemsize)
    split_k = _split_k(tokens, features, input.shape[1], most, shape, chip)
    result = input.new_empty((tokens, features))
    split = None
    if split_k > 1:
        tiles = launches.ceil_div(tokens, shape.block_m) * launches.ceil_div(features, shape.block_n)
        partials = input.new_empty((split_k, tokens, features), dtype=wide)
        split = launches.SplitSum(partials, counters(input.device, tiles))
    own_hashes = hashes(input, block.rounding, *block.shape, block.origin)
    launch = launches.weight_product(operation, result, input, block, bias, own_hashes, shape, chip, split)
    _run_fitting(launch, operation, input, block.factors, block.base)
    return result


def token_product(
    grad: torch.Tensor,
    input: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    settings: Settings,
) -> None:
    """The factors' gradients from G and X, H never leaving registers; partial sums as in `factor_gradients`."""
    chip = _architecture(input.device)
    shape = chip.shapes(input.itemsize).token_product
    extent, tile = (grad.shape[1], input.shape[1]), (shape.block_m, shape.block_n)
    wide = accumulation_dtype(torch.promote_types(input.dtype, block.factors.A.dtype))
    ranks = sum(block.factors.ranks)
    for start, stop in _row_groups(extent, ranks, wide.itemsize, tile, settings.workspace, None):
        own, into = block.rows(start, stop), gradients.rows(start, stop)
        partials = _partials(input.new_empty(0, dtype=wide), (stop - start, extent[1]), ranks, tile, None)
        launch = launches.token_product(grad[:, start:stop], input, own, estimator, into, partials, shape, chip)
        _run_fitting(launch, "token_product", input, block.factors, None)
        launches.add_partials(into, own.factors.ranks, partials).run()


def fused_rank_limit(input: torch.Tensor) -> int:
    """The largest rank for which fused kernels fit the registers and the shared memory of `input`'s device."""
    return _architecture(input.device).shapes(input.itemsize).fused_rank


def least_token_product_bytes(input: torch.Tensor, factors: Factors) -> int:
    """Bytes of the partial sums of one row of tiles, the least that `token_product` works with."""
    shape = _architecture(input.device).shapes(input.itemsize).token_product
    itemsize = accumulation_dtype(input.dtype).itemsize
    tile = (shape.block_m, shape.block_n)
    shapes = _partial_shapes((shape.block_m, input.shape[1]), sum(factors.ranks), tile, None)
    return itemsize * sum(map(math.prod, shapes))


def why_unfit(operation: str, input: torch.Tensor, factors: Factors, base: Base | None) -> str | None:
    """Why this chip has refused such a fused kernel, if it has; see `_run_fitting`."""
    return _unfit.get(_fit_key(operation, input, factors, base))


def _run_fitting(launch: Launch, operation: str, input: torch.Tensor, factors: Factors, base: Base | None) -> None:
    """Run a fused kernel, or remember that it does not fit: what a Triton version needs is known once it compiles.

    Raises `DoesNotFit` before the kernel has written anything. The table's shapes fit with the versions that
    `make kernels` compiles with.
    """
    try:
        launch.run()
    except OutOfResources as error:
        reason = f"its kernel does not fit this chip ({error})"
        _unfit[_fit_key(operation, input, factors, base)] = reason
        _logger.warning("backend 'triton', %s of %d tokens: %s; panels run", operation, input.shape[0], reason)
        raise DoesNotFit(reason) from error


def _fit_key(operation: str, input: torch.Tensor, factors: Factors, base: Base | None) -> tuple[object, ...]:
    """What decides which kernel is compiled, but for masks."""
    shapes = _architecture(input.device).shapes(input.itemsize)
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    if operation == "token_product":
        shape = shapes.token_product
    else:
        sizes = (in_features, out_features) if operation == "input_gradient" else (out_features, in_features)
        shape = shapes.weight_product(operation, input.shape[0], *sizes)
    blocks = (launches.rank_block(factor.shape[0]) for factor in (factors.A, factors.C))
    kind = None if operation == "token_product" else launches.base_kind(base)  # H and its contraction read no W0
    return (operation, shape, input.device, input.dtype, factors.A.dtype, *blocks, kind)


def _architecture(device: torch.device) -> Architecture:
    chip = architecture(device)
    assert isinstance(chip, Architecture), chip
    return chip


@lru_cache(maxsize=1024)
def _split_k(m: int, n: int, k: int, most: int, shape: ProductShape, chip: Architecture) -> int:
    """Into how many parts, `most` at most, a product's sum is cut, so that its programs end together soonest."""
    tiles = launches.ceil_div(m, shape.block_m) * launches.ceil_div(n, shape.block_n)
    steps, at_once = launches.ceil_div(k, shape.block_k), shape.programs_per_unit * chip.compute_units

    def duration(parts: int) -> int:
        return launches.ceil_div(tiles * parts, at_once) * (launches.ceil_div(steps, parts) + _SPLIT_COST)

    parts = min(range(1, max(1, min(steps // 4, most)) + 1), key=duration)
    return launches.ceil_div(k, launches.split_length(k, parts, shape))  # no empty part


@lru_cache(maxsize=1024)
def _row_groups(
    extent: tuple[int, int], ranks: int, itemsize: int, tile: tuple[int, int], budget: int, most_programs: int | None
) -> list[tuple[int, int]]:
    """Cut the rows of a block of `extent` so that each group's partial sums fit in `budget` bytes, in whole tiles.

    Groups are nearly equal, for the last one is a launch like the others.
    """
    rows, columns = extent
    row_tiles = launches.ceil_div(rows, tile[0])
    for count in range(1, row_tiles + 1):
        step = launches.ceil_div(row_tiles, count) * tile[0]
        shapes = _partial_shapes((min(rows, step), columns), ranks, tile, most_programs)
        if itemsize * sum(map(math.prod, shapes)) <= budget:
            break
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _partial_shapes(
    extent: tuple[int, int], ranks: int, tile: tuple[int, int], most_programs: int | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of buffers for partial sums: up [column groups, rows, ranks], down [row tiles, columns, ranks].

    A program takes a group of column tiles: as many as leave at most `most_programs`, and at least as many columns as a
    tile has rows, since the up sums are large where groups are narrow. Without `most_programs` a group is one tile.
    """
    (rows, columns), (tile_rows, tile_columns) = extent, tile
    row_tiles, groups = launches.ceil_div(rows, tile_rows), launches.ceil_div(columns, tile_columns)
    if most_programs is not None:
        tiles_each = launches.ceil_div(groups, max(1, most_programs // row_tiles))
        groups = launches.ceil_div(groups, max(tiles_each, launches.ceil_div(tile_rows, tile_columns)))
    return (groups, rows, ranks), (row_tiles, columns, ranks)


def _partials(
    like: torch.Tensor, extent: tuple[int, int], ranks: int, tile: tuple[int, int], most_programs: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers of `like`'s dtype for partial sums."""
    up, down = _partial_shapes(extent, ranks, tile, most_programs)
    return like.new_empty(up), like.new_empty(down)
