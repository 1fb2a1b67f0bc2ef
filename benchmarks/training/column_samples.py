"""Other samples of H's columns than the package's, as experiments: by what they are drawn, in plain PyTorch.

A sample is (columns [n] of the K, weights [n]): an estimate of a sum over all columns is the weighted sum over the
sampled ones, unbiased where a column's weight is the inverse of its chance. What a sampler may look at is X [M, K].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dual_lora_kernels import calls
from dual_lora_kernels.backends import Estimator, Factors
from dual_lora_kernels.column_sampling import Sample, choose, draw_columns
from dual_lora_kernels.reference import estimator_gradient, rank_product, sign

Sampler = Callable[[torch.Tensor, int, dict[str, Any]], Sample]
"""(X [M, K], n, the layer's own state between calls) → a sample of n columns."""


def strata(count: int, n: int) -> torch.Tensor:
    """One of each of n equal strata of `count` lines: their numbers, ascending."""
    return ((torch.arange(n) + torch.rand(n, dtype=torch.float64)) * (count / n)).long().clamp_(max=count - 1)


def _uniform(columns: torch.Tensor, count: int) -> Sample:
    return Sample(columns, torch.full((len(columns),), count / len(columns)))


def single(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
    """One column of each of n equal strata."""
    return _uniform(strata(x.shape[1], n), x.shape[1])


def random(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
    """Any n columns."""
    return _uniform(torch.randperm(x.shape[1])[:n], x.shape[1])


def _blocks(width: int) -> Sampler:
    def blocks(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
        first = strata(x.shape[1] // width, n // width) * width
        return _uniform((first[:, None] + torch.arange(width)).flatten(), x.shape[1])

    return blocks


def rounds(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
    """Every column once in each round of K / n calls, in an order drawn anew for each round."""
    if len(state.get("left", ())) < n:
        state["left"] = torch.randperm(x.shape[1])
    columns, state["left"] = state["left"][:n], state["left"][n:]
    return _uniform(columns, x.shape[1])


def by_norm(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
    """With chances as the norms of X's columns, capped at 1; systematic, so n columns whatever the chances."""
    chances = x.float().norm(dim=0)
    chances = chances.clamp(min=1e-3 * float(chances.mean()) + 1e-30)
    capped = torch.zeros_like(chances, dtype=torch.bool)
    for _ in range(8):
        rest = chances.masked_fill(capped, 0)
        scaled = rest * (n - int(capped.sum())) / rest.sum()
        now = capped | (scaled >= 1)
        if bool((now == capped).all()):
            break
        capped = now
    inclusion = scaled.masked_fill(capped, 1).double()
    edges = inclusion.cumsum(0)
    edges *= n / edges[-1]
    columns = torch.searchsorted(edges, torch.arange(n) + torch.rand((), dtype=torch.float64), right=True)
    columns = columns.clamp_(max=x.shape[1] - 1)
    return Sample(columns, (1 / inclusion[columns]).float())


def package(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
    """What the package does: chances as the norms, too, but of some tokens, and in another order."""
    return choose(x, draw_columns(x.shape[1], n / x.shape[1]))


def outliers(x: torch.Tensor, n: int, state: dict[str, Any]) -> Sample:
    """Half of the sample: the columns of the largest norms, always. The other half: of each stratum of the rest one."""
    order = x.float().norm(dim=0).argsort(descending=True)
    top, rest = order[: n // 2], order[n // 2 :].sort().values
    others = rest[strata(len(rest), n - n // 2)]
    weights = torch.cat([torch.ones(len(top)), torch.full((len(others),), len(rest) / len(others))])
    return Sample(torch.cat([top, others]), weights)


SAMPLERS: dict[str, Sampler] = {
    "single": single, "blocks of 16": _blocks(16), "blocks of 64": _blocks(64), "rounds": rounds, "norms": by_norm,
    "outliers": outliers, "random": random, "package": package,
}  # fmt: skip


def estimates(
    grad: torch.Tensor, x: torch.Tensor, factors: Factors, estimator: Estimator, sample: Sample
) -> list[torch.Tensor]:
    """∂A, ∂B, ∂C, ∂D from the sampled columns alone, in plain PyTorch; exact entries are clipped, then weighted."""
    columns, weights = sample
    A, B, C, D, scale = factors
    own_A, own_C = A[:, columns], C[:, columns]
    p, q = rank_product(B, own_A), rank_product(D, own_C)
    scaled = (grad.t() @ x[:, columns]) * scale
    grad_p = scaled * sign(q) * (p > 0) * weights
    grad_q = estimator_gradient(scaled * p.relu(), q, estimator.kind, estimator.bound) * weights
    return [
        torch.zeros_like(A).index_add_(1, columns, B.t() @ grad_p),
        grad_p @ own_A.t(),
        torch.zeros_like(C).index_add_(1, columns, D.t() @ grad_q),
        grad_q @ own_C.t(),
    ]


@contextmanager
def sampled(name: str, fraction: float) -> Iterator[None]:
    """Within it, Dual LoRA's factor gradients come from samples of `fraction` of the columns."""
    exact, sampler = calls.gradients, SAMPLERS[name]
    states: dict[int, dict[str, Any]] = {}

    def gradients(
        call: Any, grad: Any, input: Any, weight: Any, factors: Any, wanted: Any, estimator: Any, *_: Any
    ) -> list[torch.Tensor]:
        results = exact(call, grad, input, weight, factors, [wanted[0], False, False, False, False, False], estimator)
        n = max(1, round(fraction * input.shape[1]))
        sample = sampler(input, n, states.setdefault(factors[0].data_ptr(), {}))
        return [*results, *estimates(grad, input, Factors(*factors), estimator, sample)]

    calls.gradients = gradients  # type: ignore[assignment]
    try:
        yield
    finally:
        calls.gradients = exact


def can_sample(name: str, width: int, fraction: float) -> bool:
    """Whether the sample of a layer of `width` columns has a whole block."""
    size = int(name.rpartition(" ")[2]) if name.startswith("blocks") else 1
    return math.floor(fraction * width / size) >= 1
