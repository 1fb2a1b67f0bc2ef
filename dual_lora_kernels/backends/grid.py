"""Products of factors on a fixed grid of tiles, so that an element's bits do not depend on the block it is computed in.

No vendor's library promises that: on an AMD EPYC 0.2 to 2 % of the elements of a product differ between blocks of other
shapes with MKL, and cuBLAS chooses kernels by shape (docs/numerics.md). So every tile is the same call on operands of
the same shape, strides and alignment, at an absolute position in the full weight. Lines of a tile that a block does not
have are zeros: a product's chain of operations does not depend on the numbers, and no element reads another's lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..precision import accumulation_dtype, ieee_matmul
from .block import Factors

TILE = 256
"""Rows and columns of a tile. Two threads, ranks 16 and 64, 4096²: 128 costs 1.4 to 2.1 times the product as one call,
256 costs 1.1, and 512 nothing, but a small layer pays for four times the elements (docs/decisions.md)."""


class Span(NamedTuple):
    """Along one axis of a block: `tiles` tiles from `first` on, the lines `inside` each, which are the block's `lines`.

    Several tiles are whole ones; a tile that the block cuts comes alone.
    """

    first: int
    tiles: int
    inside: slice
    lines: slice


def spans(origin: int, extent: int, most: int) -> Iterator[Span]:
    """The tiles under `extent` lines from `origin` in the full weight, at most `most` at a time.

    Tiles and lines are counted from the block's own first.
    """
    line = 0
    while line < extent:
        tile, skipped = divmod(origin % TILE + line, TILE)
        whole = min(most, (extent - line) // TILE) if skipped == 0 else 0
        width = min(TILE - skipped, extent - line)
        length = whole * TILE if whole else width
        yield Span(tile, max(whole, 1), slice(skipped, skipped + width), slice(line, line + length))
        line += length


class Part(NamedTuple):
    """Some of a block's tiles: those of `rows` × `columns`."""

    rows: Span
    columns: Span

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The part of `block` [n, k]; a view."""
        return block[self.rows.lines, self.columns.lines]

    def tiles(self, lines: torch.Tensor) -> torch.Tensor:
        """A tensor of the part's shape as [row tiles, column tiles, rows, columns]; a view."""
        rows, columns = self.rows.tiles, self.columns.tiles
        return lines.view(rows, lines.shape[0] // rows, columns, lines.shape[1] // columns).transpose(1, 2)


def parts(origin: tuple[int, int], shape: torch.Size, most: int) -> Iterator[Part]:
    """The parts, of at most `most` tiles each (at least one), of a block of `shape` at `origin` in the full weight."""
    (row0, col0), (rows, columns) = origin, shape
    across = min(most, -(-columns // TILE)) or 1
    for row_span in spans(row0, rows, max(1, most // across)):
        for column_span in spans(col0, columns, across):
            yield Part(row_span, column_span)


def tile_count(origin: tuple[int, int], shape: torch.Size) -> int:
    """How many tiles lie under a block, cut ones included."""
    rows, columns = (-(-(first % TILE + extent) // TILE) for first, extent in zip(origin, shape, strict=True))
    return rows * columns


class RankProducts:
    """P = B A and Q = D C of one block, tile by tile, accumulated in fp32 (fp64 for fp64 factors).

    `factors` are the block's own, `origin` is its place in the full weight.
    """

    def __init__(self, factors: Factors, origin: tuple[int, int]) -> None:
        row0, col0 = origin
        self.dtype = accumulation_dtype(factors.A.dtype)
        self._up = [_tiles(up, row0, self.dtype) for up in (factors.B, factors.D)]
        # [tiles, r, TILE]: a tile's columns are contiguous whatever the weight's width.
        self._down = [_tiles(down.t(), col0, self.dtype).mT.contiguous() for down in (factors.A, factors.C)]

    def write(self, part: Part, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P and Q of `part`, as `Part.tiles` arranges it: views of `p` and `q`, scratch of as many whole tiles."""
        rows, columns = part
        shape = (rows.tiles, columns.tiles, TILE, TILE)
        results = []
        with ieee_matmul(p.device.type):
            for up, down, scratch in zip(self._up, self._down, (p, q), strict=True):
                tiles = scratch[: rows.tiles * columns.tiles * TILE * TILE].view(shape)
                for i in range(rows.tiles):
                    for j in range(columns.tiles):
                        torch.mm(up[rows.first + i], down[columns.first + j], out=tiles[i, j])
                results.append(tiles[:, :, rows.inside, columns.inside])
        return results[0], results[1]

    def write_drawn(
        self, part: Part, places: torch.Tensor, p: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P and Q [rows, n] of the columns at `places` [n] in the tiles of `part`, which has whole tiles of columns.

        Other arguments as for `write`. Columns gathered before would lie elsewhere in a tile, with other bits maybe.
        """
        found = (
            product.transpose(1, 2).flatten(2, 3).flatten(0, 1).index_select(1, places)
            for product in self.write(part, p, q)
        )
        return next(found), next(found)


def drawn_groups(columns: torch.Tensor, col0: int, most: int) -> Iterator[tuple[slice, Span, torch.Tensor]]:
    """(which of them, their tiles, their places in these) of ascending `columns` of a block at column `col0`.

    At most `most` tiles at a time. Reads the columns: a GPU's have to be waited for.
    """
    inside = columns + col0 % TILE
    last = int(inside[-1]) // TILE
    edges = torch.arange(last + 2, device=columns.device) * TILE
    first_of = torch.searchsorted(inside, edges).tolist()
    for tile in range(0, last + 1, most):
        stop = min(tile + most, last + 1)
        own = slice(first_of[tile], first_of[stop])
        if own.start < own.stop:
            yield own, Span(tile, stop - tile, slice(0, TILE), own), inside[own] - tile * TILE


def _tiles(lines: torch.Tensor, origin: int, dtype: torch.dtype) -> torch.Tensor:
    """`lines` [n, r] as [tiles, TILE, r] in `dtype`, at their place on the grid, zeros around them."""
    first = origin % TILE
    tiles = -(-(first + lines.shape[0]) // TILE)
    packed = lines.new_zeros((tiles * TILE, lines.shape[1]), dtype=dtype)
    packed[first : first + lines.shape[0]] = lines
    return packed.view(tiles, TILE, lines.shape[1])
