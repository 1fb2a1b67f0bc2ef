"""Rounding of W = W0 + ΔW to the compute dtype: to nearest, or with a fixed dither (unbiased, so no update is lost).

The dither is a pure function of the element's (row, column) in the full weight. It needs no random state and is the
same in forward, backward, recomputation, merge and in any shard. Constants and measurements: docs/numerics.md.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_COLUMN_SEED = 0x5BD1E995
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of an fp32 significand that each dithered dtype drops."""


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers held in int64 (a bijection of [0, 2³²) with good avalanche)."""
    values = values ^ (values >> 16)
    values = (values * 0x21F0AAAD) & _MASK32
    values = values ^ (values >> 15)
    values = (values * 0x735A2D97) & _MASK32
    return values ^ (values >> 15)


def _odd_hashes(start: int, count: int, offset: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    hashes = _mix((index + offset) & _MASK32) | 1
    return torch.where(hashes > 0x7FFFFFFF, hashes - 0x100000000, hashes).to(torch.int32)


def row_hashes(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd 32-bit hashes of rows start …, shape [count], as wrapping int32."""
    return _odd_hashes(start, count, 1, device)


def column_hashes(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd 32-bit hashes of columns start …, shape [count], as wrapping int32."""
    return _odd_hashes(start, count, _COLUMN_SEED, device)


def is_dithered(dtype: torch.dtype, rounding: str) -> bool:
    """Whether rounding to `dtype` adds the dither: ``"dither"`` does for bfloat16 and float16."""
    return rounding == "dither" and dtype in _DROPPED_BITS


def dither_field(rows: int, cols: int, row0: int, col0: int, device: torch.device) -> torch.Tensor:
    """The 32-bit field u = row[n]·col[k] mod 2³² of one block, as wrapping int32 of shape [rows, cols]."""
    return row_hashes(row0, rows, device)[:, None] * column_hashes(col0, cols, device)[None, :]


def dither_(values: torch.Tensor, dtype: torch.dtype, field: torch.Tensor) -> torch.Tensor:
    """Move fp32 `values` onto the grid of `dtype` (bfloat16 or float16), in place, and return them.

    Adds the top bits of `field`, int32 of the same shape, under the kept significand and truncates; `field` is
    overwritten. NaN stays NaN: its bits could wrap into a number. Infinity survives the addition, since its
    significand is zero and the noise is truncated away again.
    """
    dropped = _DROPPED_BITS[dtype]
    is_nan = values != values
    noise = field.bitwise_right_shift_(32 - dropped).bitwise_and_((1 << dropped) - 1)
    values.view(torch.int32).add_(noise).bitwise_and_(-(1 << dropped))
    return values.masked_fill_(is_nan, torch.nan)


def round_to(values: torch.Tensor, dtype: torch.dtype, rounding: str, row0: int = 0, col0: int = 0) -> torch.Tensor:
    """Round fp32 or fp64 `values` [rows, cols] once, to `dtype`; `values` stays as it is.

    fp32 and fp64 round to nearest, as ``"nearest"`` does for every dtype. Values already on the target's grid stay as
    they are, so W0 survives untouched where ΔW = 0.
    """
    if is_dithered(dtype, rounding):
        field = dither_field(values.shape[0], values.shape[1], row0, col0, values.device)
        values = dither_(values.to(torch.float32, copy=True), dtype, field)
    return values.to(dtype)
