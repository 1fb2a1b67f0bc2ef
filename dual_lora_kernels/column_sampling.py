"""Samples of H's columns, from which the factors' gradients are estimated, with chances as the norms of X's columns.

A column of H = Gᵀ X is at most as large as its column of X allows, and activations have columns that are much larger
than others. Chances in proportion to the norms, 1 at most, give estimates of less variance than equal ones
(docs/decisions.md). All of it stays on the device: sizes do not depend on the norms, and nothing is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .validation import check_fraction, check_positive_int

_LOOKED_AT = 1 << 20
"""Elements of X, at most, from which norms are taken: 256 tokens of 4096 columns."""
_LEAST_OF_MEAN = 0.1
_UNITS = 1 << 14
"""A chance of 1, as an integer, so that sums are exact. In 64 bits that leaves room for samples of 131,072 columns."""


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

    At least one. Without a `generator`, PyTorch's own draws, as for dropout. Raises ValueError or TypeError unless
    `in_features` is a positive integer, and 0 < `fraction` <= 1.
    """
    in_features = check_positive_int("in_features", in_features)
    count = sample_size(in_features, check_fraction("fraction", fraction))
    return torch.randint(_UNITS, (count,), device=device, generator=generator)


def sample_size(in_features: int, fraction: float) -> int:
    """How many columns a sample of that fraction has."""
    return max(1, round(fraction * in_features))


def choose(x: torch.Tensor, draws: torch.Tensor) -> Sample:
    """A sample of X's columns [M, K] by the random numbers `draws` [n].

    Laid end to end, each column as long as its chance, the largest norms first, the columns fill n strata; draw i is a
    place in stratum i. Columns whose chance is 1 are a stratum each, and come once. Others may come twice.
    """
    count, strata = draws.shape[0], torch.arange(draws.shape[0], device=draws.device)
    norms, order = _norms(x).sort(descending=True, stable=True)
    lengths = (_chances(norms, count) * _UNITS).to(torch.int64).clamp_(min=1)
    ends = lengths.cumsum(0)
    # Rounding leaves the columns' whole length off by up to K units: strata are as much longer or shorter.
    places = (strata * _UNITS + draws) * ends[-1] // (count * _UNITS)
    chosen = torch.searchsorted(ends, places, right=True)
    weights = ends[-1] / (count * lengths[chosen])
    columns, positions = order[chosen].sort()
    return Sample(columns, weights[positions].to(torch.float32))


def gathered(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns of X [M, K] as a new tensor [M, n]. In bf16 ``index_select`` took three times as long on a CPU."""
    return x.gather(1, columns.expand(x.shape[0], -1))


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Norms of X's columns [M, K], fp32 [K], none below a tenth of their mean, from some of the tokens.

    Chances may be any, as long as weights are their inverse: a pass over 2048 tokens took 3 % of a layer's step, and
    the least chance bounds the weights.
    """
    some = x[:: max(1, -(-x.numel() // _LOOKED_AT))]
    norms = some.to(torch.float32).square().sum(0).sqrt_().nan_to_num_(nan=0.0, posinf=0.0)
    return norms.clamp_(min=(_LEAST_OF_MEAN * norms.mean()).clamp(min=torch.finfo(torch.float32).tiny))


def _chances(norms: torch.Tensor, count: int) -> torch.Tensor:
    """min(1, c · norm) for norms in descending order, c such that they sum to `count` (or are all 1)."""
    tails = norms.flip(0).cumsum(0).flip(0)
    before = torch.arange(norms.shape[0], device=norms.device)
    # The first columns, m of them, have a chance of 1 as long as the next would get 1 or more of what is left.
    certain = ((count - before) * norms >= tails).sum().clamp(max=norms.shape[0] - 1)
    scaled = norms * ((count - certain) / tails[certain])
    return scaled.where(before >= certain, 1).clamp(max=1)
