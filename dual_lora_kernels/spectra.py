"""Singular values of a matrix that comes panel by panel: all of a small one's, the largest of a large one's.

A small matrix's are the roots of the eigenvalues of its Gram matrix, in fp64. That resolves values down to 1e-7 of the
largest, far below the tolerance of a rank, and takes 0.3 s for 1024² and 0.7 s for 1024 × 4096 where
``torch.linalg.svdvals`` takes 0.4 and 3.1 s (2 cores). Larger matrices get a randomised SVD (Halko, Martinsson and
Tropp, arXiv 0909.4061): 0.3 instead of 8 s for 2048 × 4096, and no more than 256 columns in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .inspection.report import Spectrum

EXACT_LIMIT = 1024
"""The smaller side of matrices whose singular values are all computed: 2048² would take 1.1 s, randomised 0.3 s."""
_SKETCH = 256
"""Columns of the sketch at least, and how many more than `spectrum` sums the energy of. With 256 the energy of the 96
largest of a 2048² update with r1 = r2 = 48 is 0.5 to 1.6 % too low, with 128 it is 4 %."""
_OVERSAMPLING = 64
_REFINEMENTS = 2
"""Products with MᵀM before the last one. With 1 the same energy is up to 8 % too low, and with twice as many columns
and 1, which takes the same time, 3 %."""
_LISTED = 32
"""Singular values in a report, at most."""

Panels = Callable[[], Iterable[torch.Tensor]]
"""Yields a matrix's row panels [n, K] in order, from the first again in each call. One may be overwritten when the next
is asked for."""


def spectrum(panels: Panels, shape: tuple[int, int], energy_rank: int) -> Spectrum:
    """The singular values of a matrix of `shape` [N, K], with the share of ‖·‖²_F in the largest `energy_rank`.

    Where min(N, K) is at most `EXACT_LIMIT` they are all computed; a matrix with N < K is held whole for that. A larger
    one's largest are found by a randomised SVD, the same in every run: none too large, and the larger half, which is
    listed, exact to a few percent. The rank is what is above max(N, K) · ε(fp32) · σ₁. Where a part of what was found
    is below that, so is the rest, almost surely, and the rank is known.

    Panels are finite. A zero matrix has rank 0, stable rank 0, an energy of 1 and no values.
    """
    is_small = min(shape) <= EXACT_LIMIT
    squares, norm_square = _all_squares(panels, shape) if is_small else _largest_squares(panels, shape, energy_rank)
    values = squares.sqrt()
    if norm_square == 0:
        return Spectrum(0, True, min(shape), 0.0, 1.0, (), ())
    tolerance = max(shape) * torch.finfo(torch.float32).eps * values[0]
    rank = int((values > tolerance).sum())
    positions = _positions(len(values) if is_small else len(values) // 2)
    return Spectrum(
        rank=rank,
        is_exact=is_small or rank < len(values),
        largest_rank=min(shape),
        stable_rank=norm_square / float(squares[0]),
        energy=min(1.0, float(squares[:energy_rank].sum()) / norm_square),
        positions=positions,
        values=tuple(float(values[position - 1] / values[0]) for position in positions),
    )


def _all_squares(panels: Panels, shape: tuple[int, int]) -> tuple[torch.Tensor, float]:
    """(σ² in falling order, their sum), by the smaller of the two Gram matrices."""
    rows, columns = shape
    parts = panels() if columns <= rows else (lines.t() for lines in _joined(panels, shape).split(rows, dim=1))
    gram = torch.zeros(min(shape), min(shape), dtype=torch.float64, device=_device(panels))
    for part in parts:
        wide = part.to(torch.float64)
        gram.addmm_(wide.t(), wide)
    return _eigenvalues(gram), float(gram.trace())


def _joined(panels: Panels, shape: tuple[int, int]) -> torch.Tensor:
    """The whole matrix, in fp32."""
    whole, row = torch.empty(shape, dtype=torch.float32, device=_device(panels)), 0
    for panel in panels():
        whole[row : row + len(panel)] = panel
        row += len(panel)
    return whole


def _largest_squares(panels: Panels, shape: tuple[int, int], energy_rank: int) -> tuple[torch.Tensor, float]:
    """(about the largest σ² in falling order, ‖M‖²_F), by products of M with few columns.

    Each refinement multiplies them by MᵀM, in one go over the panels, and makes them orthonormal. The singular values
    of M times orthonormal columns are M's at most.
    """
    count = min(*shape, max(_SKETCH, energy_rank + _OVERSAMPLING))
    basis = torch.randn(shape[1], count, generator=torch.Generator().manual_seed(0)).to(_device(panels))
    for _ in range(_REFINEMENTS):
        image = torch.zeros_like(basis)
        for panel in panels():
            narrow = panel.to(basis.dtype)
            image.addmm_(narrow.t(), narrow @ basis)
        basis = torch.linalg.qr(image).Q
    gram, norm_square = torch.zeros(count, count, dtype=torch.float64, device=basis.device), 0.0
    for panel in panels():
        product = (panel.to(basis.dtype) @ basis).to(torch.float64)
        gram.addmm_(product.t(), product)
        norm_square += float(torch.linalg.vector_norm(panel, dtype=torch.float64)) ** 2
    return _eigenvalues(gram), norm_square


def _device(panels: Panels) -> torch.device:
    return next(iter(panels())).device


def _eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """Those of a positive semidefinite matrix, in falling order; negative ones are rounding."""
    values: torch.Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_(min=0).flip(0)


def _positions(count: int) -> tuple[int, ...]:
    """At most `_LISTED` places from 1 to `count`, in equal steps of the logarithm."""
    steps = torch.logspace(0, torch.tensor(float(count)).log10().item(), _LISTED, dtype=torch.float64)
    return tuple(sorted({min(count, round(step)) for step in steps.tolist()}))
