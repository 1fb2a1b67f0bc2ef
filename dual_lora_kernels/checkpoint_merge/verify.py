"""Verifying a merged checkpoint: what was written against what another backend computes.

Two backends add the r products of an element of P = B A or Q = D C in other orders, so that last bits may differ, and
the sign of a Q near zero. Where bits differ, the element is computed in fp64, with bounds on what fp32 sums may err by
(γ_r of Higham, Accuracy and Stability, section 3.1), and the written number has to lie between the rounded bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ..backends import available_backends
from ..backends.workers import run, worker_count
from ..precision import accumulation_dtype
from ..rounding import column_hashes, dither_, is_dithered, row_hashes
from ..safetensors_file import DTYPES, SafetensorsFile, as_tensor
from .plan import Output
from .shards import FactorCache, Piece, Progress, Room, merged_piece, pieces_of

_CPU = torch.device("cpu")
_PRODUCTS = 2**19
"""How many products of factors are computed in fp64 at once: 4 MB for each factor. With 2**16 elements whatever their
rank, verifying an fp32 weight at rank 256 took 820 MB instead of 240."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verification:
    """What was found equal.

    Attributes:
        backend: which recomputed W.
        weights: how many merged weights were compared.
        other_bits: in how many of them that backend's last bits differ, all of them within the rounding of fp32 sums.
        copied_bytes: bytes of all other tensors, which are those of the base.
    """

    backend: str
    weights: int
    other_bits: int
    copied_bytes: int

    def __add__(self, other: Verification) -> Verification:
        return Verification(
            self.backend,
            self.weights + other.weights,
            self.other_bits + other.other_bits,
            self.copied_bytes + other.copied_bytes,
        )


def another_backend(used: str) -> str:
    """A backend of this installation that runs on CPUs, other than `used` where there is one."""
    return next((name for name in available_backends() if name not in (used, "triton")), used)


def verify_shard(file: SafetensorsFile, outputs: Mapping[str, Output], used: str, progress: Progress) -> Verification:
    """Compare a file that was written with what its tensors should be, recomputed by another backend than `used`.

    Raises ValueError where it has other tensors, other bytes, or weights that no order of summation explains.
    """
    expected = {name: (output.dtype, output.entry.shape) for name, output in outputs.items()}
    if {name: (entry.dtype, entry.shape) for name, entry in file.tensors.items()} != expected:
        raise ValueError(f"{str(file.path)!r} does not have the tensors that were written to it")
    backend, lanes = another_backend(used), worker_count(_CPU)
    start = min((entry.start for entry in file.tensors.values()), default=0)
    waiting = iter(list(pieces_of(outputs, start)))
    factors, found = FactorCache(), []

    def work() -> None:
        rooms = Room(), Room()
        for piece in waiting:
            content = merged_piece(piece, rooms, factors, backend)
            written = bytearray(len(content))
            file.read_into(memoryview(written), piece.position)
            found.append(_compare(file, piece, memoryview(written), content, factors, backend))
            progress(len(content))

    run([partial(work) for _ in range(lanes)], _CPU)
    total = Verification(backend, 0, 0, 0)
    for part in found:
        total += part
    return total


def _compare(
    file: SafetensorsFile, piece: Piece, written: memoryview, expected: memoryview, factors: FactorCache, backend: str
) -> Verification:
    dtype = DTYPES.get(piece.output.dtype)
    if not piece.output.updates or dtype is None:
        if written != expected:
            raise ValueError(f"{piece.name} in {str(file.path)!r} does not have the base's bytes")
        return Verification(backend, 0, 0, len(written))
    bits = _INTEGERS[dtype.itemsize]
    own, other = as_tensor(written, dtype), as_tensor(expected, dtype)
    different = (own.view(bits) != other.view(bits)).nonzero().flatten()
    columns = piece.output.entry.shape[1]
    if not len(different):
        return Verification(backend, own.numel(), 0, 0)
    stored = piece.output.source.read_rows(piece.output.tensor, piece.start, piece.stop)
    read = [factors[update].factors for update in piece.output.updates]
    rank = max(len(down) for own_factors in read for down in (own_factors.A, own_factors.C))
    for indices in different.split(max(1, _PRODUCTS // rank)):
        low, high = _bounds(stored, piece, indices // columns, indices % columns, dtype, factors)
        values = own[indices].double()
        wrong = ~((low <= values) & (values <= high) | (values.isnan() & other[indices].isnan()))
        if wrong.any():
            where = int(indices[wrong][0])
            raise ValueError(
                f"{piece.name} in {str(file.path)!r} has {own[where].item():.9g} at row "
                f"{piece.start + where // columns}, column {where % columns}, where backend {backend!r} computes "
                f"{other[where].item():.9g}; no order of summation explains that"
            )
    return Verification(backend, own.numel(), len(different), 0)


class _Lines(NamedTuple):
    """Rows n and columns k in the full weight of some elements."""

    n: torch.Tensor
    k: torch.Tensor


def _bounds(
    stored: torch.Tensor,
    piece: Piece,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
    factors: FactorCache,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest that elements of a piece may be, in fp64; `stored`: the base's numbers."""
    low = stored[rows, columns].to(dtype).double()
    high = low.clone()
    lines = _Lines(columns, rows + piece.start) if piece.output.transposed else _Lines(rows + piece.start, columns)
    for update in piece.output.updates:
        A, B, C, D, scale = factors[update].factors
        wide = accumulation_dtype(A.dtype)
        p, p_error = _product(B, A, lines)
        q, q_error = _product(D, C, lines)
        least, most = (scale.double() * (p + error).clamp(min=0) for error in (-p_error, p_error))
        sign = torch.where(q > 0, 1.0, -1.0)
        ends = torch.stack([sign * least, sign * most, *(-sign * edge for edge in (least, most))])
        is_sure = q.abs() > q_error
        delta_low = torch.where(is_sure, ends[:2].amin(0), ends.amin(0))
        delta_high = torch.where(is_sure, ends[:2].amax(0), ends.amax(0))
        slack = 4 * torch.finfo(wide).eps * (low.abs() + high.abs() + delta_low.abs() + delta_high.abs())
        low = _rounded(low + delta_low - slack, dtype, update.rounding, lines)
        high = _rounded(high + delta_high + slack, dtype, update.rounding, lines)
    return low, high


def _product(up: torch.Tensor, down: torch.Tensor, lines: _Lines) -> tuple[torch.Tensor, torch.Tensor]:
    """(elements of up @ down in fp64, the largest error of a sum in the dtype that backends accumulate in)."""
    terms = up[lines.n].double() * down[:, lines.k].double().t()
    bound = 2 * (terms.shape[1] + 2) * torch.finfo(accumulation_dtype(up.dtype)).eps
    return terms.sum(1), bound * terms.abs().sum(1)


def _rounded(values: torch.Tensor, dtype: torch.dtype, rounding: str, lines: _Lines) -> torch.Tensor:
    """`rounding.round_to` for single elements. It never falls where its argument rises."""
    if is_dithered(dtype, rounding):
        rows = row_hashes(0, int(lines.n.max()) + 1, _CPU)[lines.n]
        values = dither_(values.float(), dtype, rows * column_hashes(0, int(lines.k.max()) + 1, _CPU)[lines.k])
    return values.to(dtype).double()
