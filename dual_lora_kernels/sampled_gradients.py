"""The factors' gradients from a sample of H's columns: those of a narrower layer, each column with a weight.

A column of H = Gᵀ X needs its column of X alone, and of A and C only its own are contracted with it. So the sampled
columns of X, A and C make a layer of n columns, whose P and Q have the whole one's bits. Its ∂B and ∂D are sums over
columns, in which each counts by its weight; its ∂A and ∂C, times the weights, are those of the columns that were drawn.
``ste="clip"`` clips exact entries of ∂Q, before they are weighted: the estimate of a clipped sum is unbiased only so.
"""

from __future__ import annotations

import torch

from . import passes
from .backends import Backend, Block, Drawn, Estimator, ParameterGradients, Settings
from .column_sampling import Sample, gathered
from .panel_split import split


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    sample: Sample,
    backend: Backend,
    settings: Settings,
) -> None:
    """Add unbiased estimates of the factors' gradients. Half of the workspace holds columns of X at a time."""
    factors = block.factors
    budget = settings.workspace // 2
    settings = settings._replace(workspace=settings.workspace - budget)
    for start, stop in split(len(sample.columns), x.shape[0] * x.itemsize, budget, backend.panel_unit):
        part_of_sample = sample.part(start, stop)
        columns, weights = part_of_sample
        A, C = gathered(factors.A, columns), gathered(factors.C, columns)
        narrow = block._replace(
            base=None, factors=factors._replace(A=A, C=C), drawn=Drawn(factors.A, factors.C, part_of_sample)
        )
        down_A, down_C = (
            None if total is None else total.new_zeros(total.shape[0], len(columns))
            for total in (gradients.A, gradients.C)
        )
        part = gradients._replace(A=down_A, C=down_C)
        passes.parameter_gradients(grad, gathered(x, columns), narrow, estimator, part, backend, settings)
        for total, sums in ((gradients.A, down_A), (gradients.C, down_C)):
            if total is not None and sums is not None:
                total.index_add_(1, columns, sums.mul_(weights))
