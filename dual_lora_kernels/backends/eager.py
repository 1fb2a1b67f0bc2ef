"""Plain PyTorch: `reference`'s formulas in place, over chunks of rows. Runs on every device.

Every intermediate lives in scratch that is allocated once a block. On a CPU that matters more than the arithmetic:
with fresh temporaries the page faults made generating W 3 times slower (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import reference
from ..rounding import dither_, is_dithered
from .base import FactorGradients, Factors, FusedPasses, SharedProducts

_BUFFERS = 6
"""Chunk-sized temporaries alive at once: P, Q, a third (∂Q or dither bits), and three for masks and estimators."""


class EagerBackend:
    """The backend that is always there, and the fallback."""

    name = "eager"
    fused: FusedPasses | None = None
    shared_products: SharedProducts | None = None

    def description(self) -> str:
        return f"plain PyTorch {torch.__version__}"

    def unavailable(self) -> str | None:
        return None

    def supports(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        return None

    def reserved(self, device: torch.device) -> str | None:
        return None

    def temporaries(self, workspace: int) -> int:
        # Fewer, larger chunks beat chunks that fit in an L2 cache: 1.4 against 1.7 floors a step (docs/decisions.md).
        return workspace // 2

    def effective_weight(
        self,
        out: torch.Tensor,
        weight: torch.Tensor | None,
        factors: Factors,
        row0: int,
        col0: int,
        rounding: str,
        workspace: int,
    ) -> None:
        dithers = is_dithered(out.dtype, rounding)
        factors = factors.to(reference.accumulation_dtype(factors.A.dtype))
        for start, stop, p, q, bits in self._chunks(out, factors, workspace, torch.int32 if dithers else None):
            update = _update(factors.rows(start, stop), p, q)
            target = out[start:stop]
            base = None if weight is None else weight[start:stop]
            if dithers:
                total = update if base is None else torch.add(base, update, out=update)
                target.copy_(dither_(total.to(torch.float32), out.dtype, row0 + start, col0, bits))
            elif base is None:
                target.copy_(update)
            else:
                torch.add(base, update, out=target)

    def factor_gradients(
        self,
        h: torch.Tensor,
        factors: Factors,
        ste: str,
        clip_bound: float,
        gradients: FactorGradients,
        compute_dtype: torch.dtype,
        workspace: int,
    ) -> None:
        # `reference.product_gradients` in place: ∂Q in scratch, then ∂P in h's storage, each only if it is wanted.
        factors = factors.to(reference.accumulation_dtype(factors.A.dtype))
        wide = factors.to(h.dtype)  # fp64 inputs with fp32 factors: P and Q stay fp32, as everywhere
        for start, stop, p, q, grad_q in self._chunks(h, factors, workspace, h.dtype):
            narrow = factors.rows(start, stop)
            part, grads = wide.rows(start, stop), gradients.rows(start, stop)
            scaled = h[start:stop].mul_(factors.scale)
            reference.rank_product(narrow.B, narrow.A, p).relu_()
            reference.rank_product(narrow.D, narrow.C, q)
            if gradients.direction_wanted:
                torch.mul(scaled, p, out=grad_q)
                if ste == "clip":
                    grad_q.clamp_(-clip_bound, clip_bound)
                else:
                    grad_q.copy_(reference.estimator_gradient(grad_q, q, ste))
                _contract(grad_q, part.D, part.C, grads.D, grads.C)
            if gradients.magnitude_wanted:
                grad_p = scaled.mul_(_sign_(q)).mul_(p.gt_(0))
                _contract(grad_p, part.B, part.A, grads.B, grads.A)

    def _chunks(
        self, block: torch.Tensor, factors: Factors, workspace: int, third: torch.dtype | None
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Row ranges of `block`, each with scratch of its shape: for P, for Q, and one of dtype `third` if any."""
        rows, cols = block.shape
        dtype = reference.accumulation_dtype(factors.A.dtype)
        bytes_each = self.temporaries(workspace) // _BUFFERS
        step = min(rows, max(1, bytes_each // (dtype.itemsize * max(1, cols))))
        scratch = [block.new_empty(step * cols, dtype=dtype) for _ in range(2)]
        scratch.append(block.new_empty(step * cols if third else 0, dtype=third))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            p, q, last = (s[: (stop - start) * cols].view(-1, cols) if len(s) else s for s in scratch)
            yield start, stop, p, q, last


def _sign_(q: torch.Tensor, magnitude: torch.Tensor | float = 1.0) -> torch.Tensor:
    """`reference.sign` in place, times `magnitude`: exactly 2m − m or 0 − m. Faster than torch.where or copysign."""
    return q.gt_(0).mul_(2 * magnitude).sub_(magnitude)


def _update(factors: Factors, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`reference.delta` of one chunk, in p's storage; q is overwritten. One rounding, as there: max(P, 0) · ±s."""
    reference.rank_product(factors.B, factors.A, p)
    reference.rank_product(factors.D, factors.C, q)
    return p.relu_().mul_(_sign_(q, factors.scale))


def _contract(
    grad: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    grad_up: torch.Tensor | None,
    grad_down: torch.Tensor | None,
) -> None:
    """Gradients of a product up [n, r] @ down [r, k] from the product's gradient [n, k], added where wanted."""
    if grad_up is not None:
        grad_up.addmm_(grad, down.t())
    if grad_down is not None:
        grad_down.addmm_(up.t(), grad)
