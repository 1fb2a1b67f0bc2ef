"""Runs the kernels: output buffers, the dither's vectors, split-K, and partial sums in a fixed order.

Only for devices that `architecture` knows; the backend has checked that.
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from triton.runtime.errors import OutOfResources

from ...precision import accumulation_dtype
from ...rounding import column_hashes, is_dithered, row_hashes
from ..block import Block, Factors, ParameterGradients
from ..interface import DoesNotFit, Estimator, Settings
from . import launches
from .architecture import Architecture, architecture
from .arguments import Hashes
from .launch import Launch
from .shapes import ProductShape

_logger = logging.getLogger("dual_lora_kernels")
_PROGRAMS_PER_COMPUTE_UNIT = 2
"""Split-K cuts the sum of a product for few tokens until every SM or CU has so many programs, and so many loads in
flight."""
_TILE_MARGIN = 1024
"""Hashes beyond the weight's last line that a tile may read; larger than any tile."""
_LEAST_HASHES = 16384
_unfit: dict[tuple[object, ...], str] = {}
"""Fused kernels that their chip refused, with its reason."""
_hash_cache: dict[torch.device, list[Hashes]] = {}
"""The vectors made so far, the longest last. None is ever released: captured CUDA graphs hold their addresses."""


def effective_weight(out: torch.Tensor, block: Block) -> None:
    """See `Backend.effective_weight`."""
    if out.numel() == 0:
        return
    weight = block.load_base(out)
    row0, col0 = block.origin
    hashes = _hashes(out, block.rounding, row0 + out.shape[0], col0 + out.shape[1])
    chip = _architecture(out.device)
    shape = chip.shapes(out.itemsize).effective_weight
    launches.effective_weight(out, weight, block, hashes, shape, chip).run()


def factor_gradients(
    h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, budget: int
) -> None:
    """See `Backend.factor_gradients`; partial sums take at most `budget` bytes, or those of one row of tiles."""
    chip = _architecture(h.device)
    shape = chip.shapes(block.dtype.itemsize).factor_gradients
    tile, most_programs = (shape.rows, shape.columns), shape.programs_per_unit * chip.compute_units
    for start, stop in _row_groups(h.shape, block.factors, h.itemsize, tile, budget, most_programs):
        part, own, into = h[start:stop], block.rows(start, stop), gradients.rows(start, stop)
        partials = _partials(part, part.shape, own.factors, tile, most_programs)
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
    # With one part the result is no view of a larger buffer: autograd forbids changing such views in place.
    result = input.new_empty((tokens, features))
    out = result[None] if split_k == 1 else input.new_empty((split_k, tokens, features), dtype=wide)
    hashes = _hashes(input, block.rounding, out_features, in_features)
    launch = launches.weight_product(operation, out, input, block, bias, hashes, shape, chip)
    _run_fitting(launch, operation, input, block.factors)
    if split_k == 1:
        return result
    total = out.sum(0)
    return (total if bias is None else total.add_(bias)).to(input.dtype)


def token_product(
    grad: torch.Tensor,
    input: torch.Tensor,
    factors: Factors,
    estimator: Estimator,
    gradients: ParameterGradients,
    settings: Settings,
) -> None:
    """The factors' gradients from G and X, H never leaving registers; partial sums as in `factor_gradients`."""
    chip = _architecture(input.device)
    shape = chip.shapes(input.itemsize).token_product
    extent, tile = (grad.shape[1], input.shape[1]), (shape.block_m, shape.block_n)
    wide = accumulation_dtype(torch.promote_types(input.dtype, factors.A.dtype))
    for start, stop in _row_groups(extent, factors, wide.itemsize, tile, settings.workspace, None):
        own, into = factors.rows(start, stop), gradients.rows(start, stop)
        partials = _partials(input.new_empty(0, dtype=wide), (stop - start, extent[1]), own, tile, None)
        launch = launches.token_product(grad[:, start:stop], input, own, estimator, into, partials, shape, chip)
        _run_fitting(launch, "token_product", input, factors)
        launches.add_partials(into, own.ranks, partials).run()


def fused_rank_limit(input: torch.Tensor) -> int:
    """The largest rank for which fused kernels fit the registers and the shared memory of `input`'s device."""
    return _architecture(input.device).shapes(input.itemsize).fused_rank


def least_token_product_bytes(input: torch.Tensor, factors: Factors) -> int:
    """Bytes of the partial sums of one row of tiles, the least that `token_product` works with."""
    shape = _architecture(input.device).shapes(input.itemsize).token_product
    itemsize = accumulation_dtype(input.dtype).itemsize
    shapes = _partial_shapes((shape.block_m, input.shape[1]), factors, (shape.block_m, shape.block_n), None)
    return itemsize * sum(map(math.prod, shapes))


def why_unfit(operation: str, input: torch.Tensor, factors: Factors) -> str | None:
    """Why this chip has refused such a fused kernel, if it has; see `_run_fitting`."""
    return _unfit.get(_fit_key(operation, input, factors))


def _run_fitting(launch: Launch, operation: str, input: torch.Tensor, factors: Factors) -> None:
    """Run a fused kernel, or remember that it does not fit: what a Triton version needs is known once it compiles.

    Raises `DoesNotFit` before the kernel has written anything. The table's shapes fit with the versions that
    `make kernels` compiles with.
    """
    try:
        launch.run()
    except OutOfResources as error:
        reason = f"its kernel does not fit this chip ({error})"
        _unfit[_fit_key(operation, input, factors)] = reason
        _logger.warning("backend 'triton', %s of %d tokens: %s; panels run", operation, input.shape[0], reason)
        raise DoesNotFit(reason) from error


def _fit_key(operation: str, input: torch.Tensor, factors: Factors) -> tuple[object, ...]:
    """What decides which kernel is compiled, but for masks."""
    shapes = _architecture(input.device).shapes(input.itemsize)
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    if operation == "token_product":
        shape = shapes.token_product
    else:
        sizes = (in_features, out_features) if operation == "input_gradient" else (out_features, in_features)
        shape = shapes.weight_product(operation, input.shape[0], *sizes)
    blocks = (launches.rank_block(factor.shape[0]) for factor in (factors.A, factors.C))
    return (operation, shape, input.device, input.dtype, factors.A.dtype, *blocks)


def _architecture(device: torch.device) -> Architecture:
    chip = architecture(device)
    assert isinstance(chip, Architecture), chip
    return chip


def _hashes(like: torch.Tensor, rounding: str, rows: int, columns: int) -> Hashes:
    """The dither's vectors for a weight of at least rows × columns and a tile more, kept per device."""
    if not is_dithered(like.dtype, rounding):
        return Hashes(like, like)  # never read
    needed = max(rows, columns) + _TILE_MARGIN
    kept = _hash_cache.setdefault(like.device, [])
    if kept and len(kept[-1].rows) >= needed:
        return kept[-1]
    length = max(_LEAST_HASHES, 1 << (needed - 1).bit_length())
    if like.device.type != "cuda":
        kept.append(_make_hashes(length, like.device))
    elif torch.cuda.is_current_stream_capturing():
        return _make_hashes(length, like.device)  # in the graph's memory, written anew by each replay
    else:
        # In a thread of its own: what torch.compile's CUDA graphs allocate on theirs belongs to a pool that they reuse.
        # Its exceptions are raised here: a kernel would read past the end of shorter vectors.
        with ThreadPoolExecutor(1) as pool:
            kept.append(pool.submit(_make_hashes, length, like.device).result())
    return kept[-1]


def _make_hashes(length: int, device: torch.device) -> Hashes:
    hashes = Hashes(row_hashes(0, length, device), column_hashes(0, length, device))
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()  # calls on other streams will read them
    return hashes


def _split_k(m: int, n: int, k: int, most: int, shape: ProductShape, chip: Architecture) -> int:
    """Into how many parts, `most` at most, a product's sum is cut: a small grid leaves SMs and memory idle."""
    programs = launches.ceil_div(m, shape.block_m) * launches.ceil_div(n, shape.block_n)
    steps = launches.ceil_div(k, shape.block_k)
    wanted = min(_PROGRAMS_PER_COMPUTE_UNIT * chip.compute_units // programs, steps // 4, most)
    if wanted <= 1:
        return 1
    return launches.ceil_div(k, launches.split_length(k, wanted, shape))  # no empty part


def _row_groups(
    extent: tuple[int, ...],
    factors: Factors,
    itemsize: int,
    tile: tuple[int, int],
    budget: int,
    most_programs: int | None,
) -> list[tuple[int, int]]:
    """Cut the rows of a block of `extent` so that each group's partial sums fit in `budget` bytes, in whole tiles."""
    rows, columns = extent

    def fits(row_tiles: int) -> bool:
        shapes = _partial_shapes((min(rows, row_tiles * tile[0]), columns), factors, tile, most_programs)
        return itemsize * sum(map(math.prod, shapes)) <= budget

    fitting, beyond = 1, launches.ceil_div(rows, tile[0])
    if fits(beyond):
        fitting = beyond
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    step = fitting * tile[0]
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _partial_shapes(
    extent: tuple[int, ...], factors: Factors, tile: tuple[int, int], most_programs: int | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of buffers for partial sums: up [column groups, rows, ranks], down [row tiles, columns, ranks].

    A program takes a group of column tiles, so many that there are at most `most_programs`; without a bound a group is
    one tile.
    """
    (rows, columns), ranks = extent, sum(factors.ranks)
    row_tiles, column_tiles = launches.ceil_div(rows, tile[0]), launches.ceil_div(columns, tile[1])
    groups = column_tiles
    if most_programs is not None:
        tiles_each = launches.ceil_div(column_tiles, max(1, most_programs // row_tiles))
        groups = launches.ceil_div(column_tiles, tiles_each)
    return (groups, rows, ranks), (row_tiles, columns, ranks)


def _partials(
    like: torch.Tensor, extent: tuple[int, ...], factors: Factors, tile: tuple[int, int], most_programs: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers of `like`'s dtype for partial sums."""
    up, down = _partial_shapes(extent, factors, tile, most_programs)
    return like.new_empty(up), like.new_empty(down)
