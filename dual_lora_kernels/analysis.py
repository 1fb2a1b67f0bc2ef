"""Figures of one layer's update, summed over blocks of the weight: neither ΔW nor W is ever whole.

P and Q come from the backend that training runs on, so that what counts as frozen, and as negative, is what trained so:
W_m = ReLU(BA) and W_d = Sign(DC) are updates themselves, with factors of ones in the other group's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .backends import Backend, Base, Block, Factors, resolve_backend
from .inspection.report import Magnitudes
from .panel_split import split
from .precision import accumulation_dtype
from .runtime_settings import current_settings, default_backend

_BYTES_PER_ENTRY = 32
"""What `Figures.add` has in memory for each entry of a block at most: fp32 panels, and one in fp64."""
_MOST_ENTRIES = 2**20
"""Of a block, whatever the workspace: larger ones are no faster, and fp32 counts up to 2²⁴."""
_EXPONENTS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Integers of a dtype's size, how far its exponents are shifted in them, and the exponents' bias."""


def magnitude(factors: Factors) -> Factors:
    """Factors whose update is W_m = ReLU(BA): Q is 1, and so is the scale."""
    A, B, C, D, scale = factors
    return Factors(A, B, torch.ones_like(C[:1]), torch.ones_like(D[:, :1]), torch.ones_like(scale))


def direction(factors: Factors) -> Factors:
    """Factors whose update is W_d = Sign(DC): P is 1, and so is the scale."""
    A, B, C, D, scale = factors
    return Factors(torch.ones_like(A[:1]), torch.ones_like(B[:, :1]), C, D, torch.ones_like(scale))


def block_entries() -> int:
    """How many entries a block may have so that its figures take no more than the workspace."""
    return max(1, min(_MOST_ENTRIES, current_settings().workspace // _BYTES_PER_ENTRY))


def block(factors: Factors, base: Base | None = None) -> Block:
    """A whole layer as one block, of the dtype that P and Q accumulate in."""
    return Block(base, factors, "nearest", accumulation_dtype(factors.A.dtype))


def row_panels(whole: Block) -> Iterator[Block]:
    """A block as row panels of about `block_entries`, at least a row each, in order."""
    (rows, columns), unit = whole.shape, backend_of(whole).panel_unit
    return (whole.rows(start, stop) for start, stop in split(rows, columns, block_entries(), unit))


def computed(block: Block) -> torch.Tensor:
    """The block's W, or ΔW where it has no base: a new tensor [n, k] of its dtype, by the backend of calls."""
    out = torch.empty(block.shape, dtype=block.dtype, device=block.factors.A.device)
    backend_of(block).effective_weight(out, block, current_settings())
    return out


def backend_of(block: Block) -> Backend:
    """The backend of calls that name none, for the block. Raises ValueError as `resolve_backend` does."""
    factor = block.factors.A
    return resolve_backend(default_backend(), factor.device, block.dtype, factor.dtype)


@dataclass
class Overlap:
    """Sums over the entries of two updates of one layer, ΔW and another ΔW'.

    Attributes:
        product, square: Σ ΔW·ΔW' and Σ ΔW'².
        equal_signs: entries with the same Sign(DC).
        both_active: entries with P > 0 in both.
    """

    product: float = 0.0
    square: float = 0.0
    equal_signs: int = 0
    both_active: int = 0


@dataclass
class Figures:
    """Sums over the entries of one layer that were added.

    Attributes:
        entries, active, negative, changed: how many there are; with P > 0; with Sign(DC) = −1; with ΔW ≠ 0.
        unchanged: with round(W0 + ΔW) = W0, rounded to nearest in W0's dtype.
        square, base_square: Σ ΔW² and Σ W0², in fp64.
        largest: max |ΔW|.
        exponents: how many |ΔW| have each exponent, as the dtype's bits have it, so the first is for zeros as well.
        bias: that is subtracted from those.
        overlaps: with other updates, by name.
    """

    entries: int = 0
    active: int = 0
    negative: int = 0
    changed: int = 0
    unchanged: int = 0
    square: float = 0.0
    base_square: float = 0.0
    largest: float = 0.0
    exponents: list[int] = field(default_factory=list)
    bias: int = 0
    overlaps: dict[str, Overlap] = field(default_factory=dict)

    def add(self, block: Block, others: Mapping[str, Factors]) -> None:
        """Add a block, and its overlap with `others`: other factors of the same layer, whole, by name.

        Raises ValueError where an update, or W0, has a sum of squares that is not finite.
        """
        update, sizes, signs = _parts(block)
        entries = update.numel()
        self.square += _sum_of_squares("the update", update)
        self.entries += entries
        self.active += _positive(sizes)
        self.negative += (entries - int(signs.sum())) // 2
        for name, factors in others.items():
            overlap = self.overlaps.setdefault(name, Overlap())
            other, other_sizes, other_signs = _parts(block._replace(factors=_part(factors, block)))
            overlap.square += _sum_of_squares(f"the update of {name}", other)
            overlap.product += _dot(update, other)
            overlap.equal_signs += (entries + int((signs * other_signs).sum())) // 2
            overlap.both_active += _positive(sizes.sign().mul_(other_sizes))
        self._add_sizes(update.abs_())
        if block.base is not None:
            self._add_base(block, block.base)

    def _add_sizes(self, sizes: torch.Tensor) -> None:
        """Add |ΔW| of a block."""
        integers, shift, self.bias = _EXPONENTS[sizes.dtype]
        self.changed += _positive(sizes)
        self.largest = max(self.largest, float(sizes.max()))
        counts = torch.bincount(sizes.flatten().view(integers) >> shift, minlength=2 * self.bias + 2).tolist()
        self.exponents = [a + b for a, b in zip(self.exponents or [0] * len(counts), counts, strict=True)]

    def _add_base(self, block: Block, base: Base) -> None:
        before = torch.empty(block.shape, dtype=base.dtype, device=base.device)
        base.load(before)
        self.base_square += _sum_of_squares("the base weight", before)
        self.unchanged += int((computed(block._replace(dtype=base.dtype)) == before).sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return math.sqrt(self.square)

    @property
    def frozen(self) -> float:
        """Share of entries with P ≤ 0."""
        return 1 - self.active / self.entries

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖_F / ‖W0‖_F; infinite where W0 is zero and ΔW is not."""
        if self.base_square == 0:
            return math.inf if self.square else 0.0
        return math.sqrt(self.square / self.base_square)

    @property
    def rounded_away(self) -> float:
        """Share of the entries with ΔW ≠ 0 that leave W0 as it is when W0 + ΔW is rounded to nearest; 0 of none."""
        return (self.unchanged - (self.entries - self.changed)) / max(1, self.changed)

    @property
    def magnitudes(self) -> Magnitudes:
        """The distribution of |ΔW|."""
        counts = [self.exponents[0] - (self.entries - self.changed), *self.exponents[1:]]
        present = [index for index, count in enumerate(counts) if count]
        first, last = (present[0], present[-1] + 1) if present else (0, 0)
        exponent = first - self.bias if present else 0
        rms = math.sqrt(self.square / self.entries)
        return Magnitudes(rms, self.largest, exponent, tuple(counts[first:last]))

    def cosine(self, name: str) -> float:
        """⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖) with the named other update; 0 where one is zero."""
        overlap = self.overlaps[name]
        norms = self.norm * math.sqrt(overlap.square)
        return max(-1.0, min(1.0, overlap.product / norms)) if norms else 0.0


def figures(blocks: Iterable[Block], others: Mapping[str, Factors] | None = None) -> Figures:
    """The figures of all `blocks` of a layer, with W0's where they have bases, and of their overlap with `others`.

    Blocks have accumulation's dtype: see `row_panels`. They should be of about `block_entries`.
    """
    total = Figures()
    for block in blocks:
        total.add(block, others or {})
    return total


def _parts(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ΔW, W_m, W_d) of a block. ΔW has the kernels' bits: one product is rounded, that with a sign is exact."""
    alone = block._replace(base=None)
    sizes, signs = (computed(alone._replace(factors=part(block.factors))) for part in (magnitude, direction))
    return sizes * block.factors.scale * signs, sizes, signs


def _part(factors: Factors, block: Block) -> Factors:
    """The factors, of a whole layer, that update a block of it."""
    (row, column), (rows, columns) = block.origin, block.shape
    return factors.rows(row, row + rows).columns(column, column + columns)


def _positive(panel: torch.Tensor) -> int:
    """How many entries are above 0, of a panel without negative ones. Faster than counting what is not zero."""
    return int(torch.sign(panel).sum())


def _sum_of_squares(what: str, panel: torch.Tensor) -> float:
    total = _dot(panel, panel)
    if not math.isfinite(total):
        raise ValueError(f"{what} holds NaN or infinity, or squares beyond fp64's range; expected finite numbers")
    return total


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """The sum of products, in fp64; in fp32 on MPS, which has no other."""
    dtype = torch.float32 if one.device.type == "mps" else torch.float64
    wide = one.flatten().to(dtype)
    return float(torch.dot(wide, wide if other is one else other.flatten().to(dtype)))
