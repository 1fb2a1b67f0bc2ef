"""Runs the kernels: output buffers, the dither's vectors, splits of a sum, and partial sums in a fixed order.

Only for devices that `architecture` knows; the backend has checked that.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from triton.runtime.errors import OutOfResources

from ..._logging import logger
from ...precision import accumulation_dtype
from ...rounding import column_hashes, is_dithered, row_hashes
from ..base import DoesNotFit, FactorGradients, Factors
from . import launches
from .architecture import Architecture, architecture
from .shapes import ProductShape

_PROGRAMS_PER_PROCESSOR = 2
"""A product for few tokens is split over its sum until every processor has so many programs and loads in flight."""
_TILE_MARGIN = 1024
"""Hashes beyond the weight's last line that a tile may read; larger than any tile."""
_LEAST_HASHES = 16384
_unfit: dict[tuple[object, ...], str] = {}
"""Fused kernels that their chip refused, with its reason."""
_hash_cache: dict[torch.device, list[launches.Hashes]] = {}
"""The vectors made so far, the longest last. None is ever released: captured CUDA graphs hold their addresses."""


def effective_weight(
    out: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    row0: int,
    col0: int,
    rounding: str,
) -> None:
    """See `Backend.effective_weight`."""
    if out.numel() == 0:
        return
    chip = _architecture(out.device)
    shape = chip.shapes(out.itemsize).effective_weight
    hashes = _hashes(out, rounding, row0 + out.shape[0], col0 + out.shape[1])
    launches.effective_weight(out, weight, factors, row0, col0, rounding, hashes, shape, chip).run()


def factor_gradients(
    h: torch.Tensor,
    factors: Factors,
    ste: str,
    clip_bound: float,
    gradients: FactorGradients,
    compute_dtype: torch.dtype,
    budget: int,
) -> None:
    """See `Backend.factor_gradients`; partial sums take at most `budget` bytes, or those of one row of tiles."""
    chip = _architecture(h.device)
    shape = chip.shapes(compute_dtype.itemsize).factor_gradients
    for start, stop in _row_groups(
        h.shape, factors, h.itemsize, shape.rows, shape.columns * shape.column_tiles, budget
    ):
        block, part = h[start:stop], factors.rows(start, stop)
        up, down = _partials(block, block.shape, part, shape.rows, shape.columns * shape.column_tiles)
        launches.factor_gradients(block, part, ste, clip_bound, gradients, compute_dtype, up, down, shape, chip).run()
        _accumulate(gradients.rows(start, stop), up, down, part)


def weight_product(
    operation: str,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    bias: torch.Tensor | None,
    rounding: str,
    workspace: int,
) -> torch.Tensor:
    """Y of ``"forward"``, ∂X of ``"input_gradient"``: [tokens, features] in the input's dtype."""
    transposed = operation == "input_gradient"
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    tokens, features = input.shape[0], in_features if transposed else out_features
    if tokens == 0:
        return input.new_empty(0, features)
    chip = _architecture(input.device)
    shape = chip.shapes(input.itemsize).weight_product(operation, tokens, features, input.shape[1])
    wide = accumulation_dtype(input.dtype)
    most = workspace // (tokens * features * wide.itemsize)
    splits = _splits(tokens, features, input.shape[1], most, shape, chip)
    # With one part the result is no view of a larger buffer: autograd forbids changing such views in place.
    result = input.new_empty((tokens, features))
    out = result[None] if splits == 1 else input.new_empty((splits, tokens, features), dtype=wide)
    hashes = _hashes(input, rounding, out_features, in_features)
    launch = launches.weight_product(out, input, weight, factors, bias, rounding, transposed, hashes, shape, chip)
    _run_fitting(launch, operation, input, factors)
    if splits == 1:
        return result
    total = out.sum(0)
    return (total if bias is None else total.add_(bias)).to(input.dtype)


def token_product(
    grad: torch.Tensor,
    input: torch.Tensor,
    factors: Factors,
    ste: str,
    clip_bound: float,
    gradients: FactorGradients,
    workspace: int,
) -> None:
    """The factors' gradients from G and X, H never leaving registers; partial sums as in `factor_gradients`."""
    chip = _architecture(input.device)
    shape = chip.shapes(input.itemsize).token_product
    extent = (grad.shape[1], input.shape[1])
    wide = accumulation_dtype(torch.promote_types(input.dtype, factors.A.dtype))
    for start, stop in _row_groups(extent, factors, wide.itemsize, shape.first, shape.second, workspace):
        part = factors.rows(start, stop)
        like = input.new_empty(0, dtype=wide)
        up, down = _partials(like, (stop - start, extent[1]), part, shape.first, shape.second)
        launch = launches.token_product(
            grad[:, start:stop], input, part, ste, clip_bound, gradients, up, down, shape, chip
        )
        _run_fitting(launch, "token_product", input, factors)
        _accumulate(gradients.rows(start, stop), up, down, part)


def fused_rank_limit(input: torch.Tensor) -> int:
    """The largest rank for which fused kernels fit the registers and the shared memory of `input`'s device."""
    return _architecture(input.device).shapes(input.itemsize).fused_rank


def least_token_product_bytes(input: torch.Tensor, factors: Factors) -> int:
    """Bytes of the partial sums of one row of tiles, the least that `token_product` works with."""
    shape = _architecture(input.device).shapes(input.itemsize).token_product
    itemsize = accumulation_dtype(input.dtype).itemsize
    return _partial_bytes(input.shape[1], factors, itemsize, shape.first, shape.second)


def why_unfit(operation: str, input: torch.Tensor, factors: Factors) -> str | None:
    """Why this chip has refused such a fused kernel, if it has; see `_run_fitting`."""
    return _unfit.get(_fit_key(operation, input, factors))


def _run_fitting(launch: launches.Launch, operation: str, input: torch.Tensor, factors: Factors) -> None:
    """Run a fused kernel, or remember that it does not fit: what a Triton version needs is known once it compiles.

    Raises `DoesNotFit` before the kernel has written anything. The table's shapes fit with the versions that
    `make kernels` compiles with.
    """
    try:
        launch.run()
    except OutOfResources as error:
        reason = f"its kernel does not fit this chip ({error})"
        _unfit[_fit_key(operation, input, factors)] = reason
        logger.warning("backend 'triton', %s of %d tokens: %s; panels run", operation, input.shape[0], reason)
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


def _partial_bytes(columns: int, factors: Factors, itemsize: int, tile_rows: int, tile_columns: int) -> int:
    """Bytes of partial sums for one row of tiles."""
    ranks = factors.A.shape[0] + factors.C.shape[0]
    return itemsize * ranks * (columns + tile_rows * launches.ceil_div(columns, tile_columns))


def _architecture(device: torch.device) -> Architecture:
    chip = architecture(device)
    assert isinstance(chip, Architecture), chip
    return chip


def _hashes(like: torch.Tensor, rounding: str, rows: int, columns: int) -> launches.Hashes:
    """The dither's vectors for a weight of at least rows × columns and a tile more, kept per device."""
    if not is_dithered(like.dtype, rounding):
        return launches.Hashes(like, like)  # never read
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


def _make_hashes(length: int, device: torch.device) -> launches.Hashes:
    hashes = launches.Hashes(row_hashes(0, length, device), column_hashes(0, length, device))
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()  # calls on other streams will read them
    return hashes


def _splits(tokens: int, features: int, length: int, most: int, shape: ProductShape, chip: Architecture) -> int:
    """Into how many parts, `most` at most, a product's sum is cut: a small grid leaves processors and memory idle."""
    programs = launches.ceil_div(tokens, shape.tokens) * launches.ceil_div(features, shape.first)
    steps = launches.ceil_div(length, shape.second)
    wanted = min(_PROGRAMS_PER_PROCESSOR * chip.processors // programs, steps // 4, most)
    if wanted <= 1:
        return 1
    return launches.ceil_div(length, launches.split_length(length, wanted, shape))  # no empty part


def _row_groups(
    extent: tuple[int, ...], factors: Factors, itemsize: int, tile_rows: int, tile_columns: int, budget: int
) -> list[tuple[int, int]]:
    """Cut the rows of a block of `extent` so that each group's partial sums fit in `budget` bytes, in whole tiles."""
    rows, columns = extent
    bytes_each = _partial_bytes(columns, factors, itemsize, tile_rows, tile_columns)
    step = max(1, budget // bytes_each) * tile_rows
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _partials(
    like: torch.Tensor, extent: tuple[int, ...], factors: Factors, tile_rows: int, tile_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers of `like`'s dtype for partial sums: up [column tiles, rows, ranks], down [row tiles, ranks, columns]."""
    rows, columns = extent
    ranks = factors.A.shape[0] + factors.C.shape[0]
    return (
        like.new_empty(launches.ceil_div(columns, tile_columns), rows, ranks),
        like.new_empty(launches.ceil_div(rows, tile_rows), ranks, columns),
    )


def _accumulate(gradients: FactorGradients, up: torch.Tensor, down: torch.Tensor, factors: Factors) -> None:
    """Add the partial sums, in a fixed order, where gradients are wanted."""
    r1 = factors.A.shape[0]
    total_up, total_down = up.sum(0), down.sum(0)
    for gradient, part in (
        (gradients.A, total_down[:r1]),
        (gradients.B, total_up[:, :r1]),
        (gradients.C, total_down[r1:]),
        (gradients.D, total_up[:, r1:]),
    ):
        if gradient is not None:
            gradient.add_(part)
