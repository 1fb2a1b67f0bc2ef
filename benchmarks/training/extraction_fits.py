"""Ways of finding the Dual LoRA update that is nearest to a given matrix, and LoRA's, which is known.

To minimise ‖M − ReLU(B A) ⊙ Sign(D C)‖_F over four factors is not convex, and constant almost everywhere in C and D. So
there are several ways, and what is best of them is an upper bound of the least error. The factor s is left out: it can
be a part of A.

A matrix of rank 1 is within reach exactly, with r1 = r2 = 1: u vᵀ = ReLU(|u| |v|ᵀ) ⊙ Sign(u vᵀ). One of rank k > 1 is
not, in general, with r1 = r2 = k: its absolute values would have to have rank k too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dual_lora_kernels.reference import delta, rank_product, sign

DESCENT_STEPS, RANDOM_STEPS = 100, 200
"""From a start by SVD, 500 and 1000 steps end within 0.01 of 100, on either side. A random start ends far above: on two
layers with r1 = r2 = 8, 200 steps at 0.54 and 0.69, 2000 at 0.54 and 0.68, where the others reach 0.41 and 0.57."""
_RATE, _RANDOM_RATE = 1e-2, 1e-1
"""Adam's steps, as shares of a factor's rms: the best of 3e-3, 1e-2, 3e-2 and of 1e-2, 3e-2, 1e-1, 3e-1."""
_SHARPNESS = (0.1, 0.01)
"""First and last temperature of tanh, as shares of Q's rms. From 1 or 0.3 a start by SVD is lost on the way."""
_ROUNDS, _COMPLETIONS = 3, 2
"""More helps where M has the form, and not at all on weights' differences."""
_BETAS = (0.9, 0.99)


class Factors(NamedTuple):
    """The four factors, shaped as in a layer; the scale is 1."""

    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor

    def update(self) -> torch.Tensor:
        """ΔW [N, K]."""
        p, q = rank_product(self.B, self.A), rank_product(self.D, self.C)
        return delta(p, q, torch.ones((), dtype=p.dtype))


class Fit(NamedTuple):
    """Factors as in a layer, and ‖M − ΔW‖_F / ‖M‖_F with their ΔW."""

    factors: Factors
    error: float


Way = Callable[[torch.Tensor, int, int], Fit]


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [N, rank], down [rank, K]), whose product is the nearest matrix of that rank: LoRA's extraction."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * v[:rank]


def relative_error(matrix: torch.Tensor, found: torch.Tensor) -> float:
    """‖M − found‖_F / ‖M‖_F."""
    return float((matrix - found).norm() / matrix.norm())


def alternating(matrix: torch.Tensor, r1: int, r2: int) -> Fit:
    """One group at a time, by completing the matrix that its product should be; then descent.

    Where the error does not depend on an entry of a product, it keeps its value: in P where the sign is wrong and
    P ≤ 0, in Q where the sign is right by a margin of Q's rms. Elsewhere P becomes M's entry times the sign, and Q
    moves to the margin on the right side, the further the more this sign matters, by |M| · ReLU(P).
    """
    wanted = sign(matrix)
    D, C = low_rank(wanted * matrix.abs().sqrt(), r2)
    B, A = low_rank(matrix * sign(D @ C), r1)
    best = _fit(matrix, Factors(A, B, C, D))
    for _ in range(_ROUNDS):
        aligned = matrix * sign(D @ C)
        for _ in range(_COMPLETIONS):
            B, A = low_rank(torch.where(aligned > 0, aligned, (B @ A).clamp_(max=0)), r1)
        best = min(best, _fit(matrix, Factors(A, B, C, D)), key=_error)
        weight = matrix.abs() * (B @ A).relu_()
        weight /= weight.max()
        for _ in range(_COMPLETIONS):
            q = D @ C
            q /= _rms(q)
            gap = (1 - q * wanted).clamp_(min=0)
            D, C = low_rank(q.addcmul_(weight * wanted, gap), r2)
    return descend(matrix, best.factors)


def from_signs(matrix: torch.Tensor, r1: int, r2: int) -> Fit:
    """Descent from the nearest low-rank matrix to Sign(M), and to M ⊙ Sign(Q) for the magnitudes."""
    D, C = low_rank(torch.sign(matrix), r2)
    B, A = low_rank(matrix * sign(D @ C), r1)
    return descend(matrix, Factors(A, B, C, D))


def from_lora(matrix: torch.Tensor, r1: int, r2: int) -> Fit:
    """Descent from LoRA's extraction of rank r2: its signs exactly, its absolute values as well as rank r1 can."""
    D, C = low_rank(matrix, r2)
    B, A = low_rank((D @ C).abs(), r1)
    return descend(matrix, Factors(A, B, C, D))


def from_noise(matrix: torch.Tensor, r1: int, r2: int) -> Fit:
    """Descent from Gaussian factors with the straight-through estimator: what training does, on the error itself."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = matrix.shape
    shapes = ((r1, columns), (rows, r1), (r2, columns), (rows, r2))
    factors = Factors(*(torch.randn(shape, generator=generator).to(matrix) for shape in shapes))
    root = (_rms(matrix) / math.sqrt(r1)).sqrt()
    return descend(matrix, factors._replace(A=factors.A * root, B=factors.B * root), straight_through=True)


WAYS: dict[str, Way] = {
    "alternating": alternating,
    "from signs": from_signs,
    "from LoRA": from_lora,
    "from noise": from_noise,
}


def descend(matrix: torch.Tensor, start: Factors, *, straight_through: bool = False) -> Fit:
    """Adam on all four factors; the best that it met, the start included.

    Sign(Q) is tanh(Q / τ) with τ falling geometrically, or itself with the identity as its derivative
    (`straight_through`). Every step has a factor's own rms as its unit, and falls to zero as half a cosine.
    """
    root = _rms(start.D @ start.C).sqrt()
    factors = Factors(start.A.clone(), start.B.clone(), start.C / root, start.D / root)
    first = [torch.zeros_like(factor) for factor in factors]
    second = [torch.zeros_like(factor) for factor in factors]
    best = _fit(matrix, factors)
    steps, rate = (RANDOM_STEPS, _RANDOM_RATE) if straight_through else (DESCENT_STEPS, _RATE)
    for step in range(1, steps + 1):
        temperature = None if straight_through else _SHARPNESS[0] * (_SHARPNESS[1] / _SHARPNESS[0]) ** (step / steps)
        step_rate = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        step_rate *= math.sqrt(1 - _BETAS[1] ** step) / (1 - _BETAS[0] ** step)
        for factor, gradient, mean, square in zip(
            factors, _gradients(matrix, factors, temperature), first, second, strict=True
        ):
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.lerp_(gradient.square(), 1 - _BETAS[1])
            factor -= step_rate * _rms(factor) * mean / square.sqrt().clamp_(min=torch.finfo(square.dtype).tiny)
        if step % 20 == 0 or step == steps:
            best = min(best, _fit(matrix, factors), key=_error)
    return best


def _gradients(matrix: torch.Tensor, factors: Factors, temperature: float | None) -> Factors:
    """Of ½ ‖M − ReLU(P) ⊙ S‖²_F, where S is tanh(Q / τ) or, without a τ, Sign(Q) straight through."""
    A, B, C, D = factors
    p, q = B @ A, D @ C
    magnitude = p.relu()
    if temperature is None:
        signs, slope = sign(q), torch.ones((), dtype=q.dtype)
    else:
        width = temperature * _rms(q)
        signs = q.div_(width).tanh_()
        slope = (1 - signs.square()).div_(width)
    error = (magnitude * signs).sub_(matrix)
    grad_q = magnitude.mul_(error).mul_(slope)
    grad_p = error.mul_(signs).mul_(p > 0)
    return Factors(B.t() @ grad_p, grad_p @ A.t(), D.t() @ grad_q, grad_q @ C.t())


def _fit(matrix: torch.Tensor, factors: Factors) -> Fit:
    """With copies: descent goes on in place."""
    return Fit(Factors(*(factor.clone() for factor in factors)), relative_error(matrix, factors.update()))


def _error(fit: Fit) -> float:
    return fit.error


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean().sqrt()
