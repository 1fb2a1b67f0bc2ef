"""Samples of H's columns, from which the factors' gradients are estimated.

A column of H = Gᵀ X is at most as large as its column of X allows, and activations have columns that are much larger
than others. Chances in proportion to the norms, 1 at most, give estimates of less variance than equal ones
(docs/decisions.md). Norms are rounded to integers, and all else is exact: a column's weight is the inverse of its
chance, and the same norms give the same sample everywhere. Sizes do not depend on the norms, so nothing waits for the
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .validation import check_fraction, check_positive_int

_PLACES = 1 << 31
"""Places within a stratum that a draw can choose."""
_MEAN = 1 << 12
"""The mean norm as an integer. Products of it, half a million columns and `_PLACES` stay below 2⁶³."""
_LEAST = _MEAN // 10
"""The least norm, which bounds weights: a column that looks like zeros may not be where nobody has looked."""
_LOOKED_AT = 1 << 20
"""Elements of X, at most, from which norms are taken: 256 tokens of 4096 columns. A pass over 2048 tokens took 3 % of a
layer's step, and chances may be any as long as weights are their inverse."""


_GOLDEN = 2654435769
"""2³² over the golden ratio."""


class Sample(NamedTuple):
    """Columns of H, int64 [n], ascending, and how many times each counts, fp32 [n]: the inverse of its chance."""

    columns: torch.Tensor
    weights: torch.Tensor

    def part(self, start: int, stop: int) -> Sample:
        """Its columns start … stop."""
        return Sample(self.columns[start:stop], self.weights[start:stop])


def draw_columns(
    in_features: int,
    fraction: float,
    device: torch.device | str | None = None,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Random numbers by which `dual_lora_linear` chooses n columns: int64 [n], n the nearest to fraction · in_features.

    At least one; from 0 to 2³¹ − 1. Without a `generator`, PyTorch's own draws, as for dropout. Raises ValueError or
    TypeError unless `in_features` is a positive integer, and 0 < `fraction` <= 1.
    """
    in_features = check_positive_int("in_features", in_features)
    return draw(sample_size(in_features, check_fraction("fraction", fraction)), device, generator)


def sample_size(in_features: int, fraction: float) -> int:
    """How many columns a sample of that fraction has."""
    return max(1, round(fraction * in_features))


def draw(
    count: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """`draw_columns` for a sample of `count` columns."""
    return torch.randint(_PLACES, (count,), device=device, generator=generator)


def choose(x: torch.Tensor, draws: torch.Tensor) -> Sample:
    """A sample of X's columns [M, K] by the random numbers `draws` [n].

    The columns whose chance is 1, c of them, come once each. The others, laid end to end, each as long as its norm,
    fill n − c strata of equal length, up to rounding, and a draw is a place in one of them. A column that lies in two
    strata may come twice.
    """
    count = draws.shape[0]
    norms, order = _norms(x).sort(descending=True, stable=True)
    ends = norms.cumsum(0)
    left = ends[-1] - ends + norms  # of this column and those after it
    number = torch.arange(norms.shape[0], device=x.device)
    # The next column is certain as long as it has its share, or more, of what is left.
    certain = ((count - number) * norms >= left).sum()
    strata = (count - certain).clamp(min=1)
    first = (number[:count] - certain).clamp(min=0)
    length = left[certain.clamp(max=norms.shape[0] - 1)]
    start = first * length // strata
    width = (first + 1) * length // strata - start
    place = ends[-1] - length + start + draws.clamp(0, _PLACES - 1) * width // _PLACES
    is_certain = number[:count] < certain
    chosen = torch.searchsorted(ends, place, right=True).clamp(max=norms.shape[0] - 1)
    chosen = number[:count].where(is_certain, chosen)
    weights = (width.to(torch.float32) / norms[chosen].to(torch.float32)).where(~is_certain, 1.0)
    columns, position = order[chosen].sort()
    return Sample(columns, weights[position])


def gathered(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns of X [M, K] as a new tensor [M, n]. In bf16 ``index_select`` took three times as long on a CPU."""
    return x.gather(1, columns.expand(x.shape[0], -1))


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Norms of X's columns [M, K] over some of the tokens, as integers with a mean of about `_MEAN`: int64 [K].

    Tokens lie at multiples of the golden ratio: at equal distances, of a sequence's length say, they may all be alike.
    A column whose square overflows counts as 10³⁰.
    """
    tokens, wanted = x.shape[0], max(1, _LOOKED_AT // x.shape[1])
    if wanted < tokens:
        multiples = torch.arange(wanted, device=x.device) * _GOLDEN % (1 << 32)
        x = x.index_select(0, multiples * tokens >> 32)
    norms = x.to(torch.float32).square().sum(0).sqrt_().nan_to_num_(nan=0.0, posinf=1e30)
    relative = norms / norms.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (relative * _MEAN).to(torch.int64).clamp_(min=_LEAST)
