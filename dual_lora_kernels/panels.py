"""The three passes of a Dual LoRA layer, panel by panel in a bounded workspace.

A backend writes W for a panel of rows (or columns) into a buffer, the vendor's matrix product consumes it, then the
next panel. Neither W nor ΔW nor H is ever whole in memory, and every large product runs at the vendor's speed.
Shapes: X [M, K], G [M, N], W0 [N, K]; M tokens, K = in_features, N = out_features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .backends.base import PANEL_UNIT, Backend, FactorGradients, Factors, SharedProducts
from .precision import accumulation_dtype
from .validation import check_positive_int

DEFAULT_WORKSPACE_BYTES = 32 * 1024 * 1024
_workspace_bytes = DEFAULT_WORKSPACE_BYTES


def set_workspace_bytes(count: int) -> None:
    """Bound the temporary memory of a call, in bytes (default 32 MiB).

    A panel takes at least one row or column, the Triton backend's partial sums of gradients at least one row of tiles,
    and the eager backend six tiles, 1.5 MiB (3 MiB for fp64 factors), so the bound is exceeded where that alone is
    larger.
    """
    global _workspace_bytes
    _workspace_bytes = check_positive_int("count", count)


def workspace_bytes() -> int:
    """The bound that `set_workspace_bytes` set."""
    return _workspace_bytes


def split(extent: int, bytes_per_line: int, budget: int, unit: int = PANEL_UNIT) -> list[tuple[int, int]]:
    """Split `extent` lines into as few, nearly equal panels of at most `budget` bytes as possible.

    They start at multiples of `unit` lines where that many fit, else of `PANEL_UNIT`, else anywhere.
    """
    largest = max(1, budget // max(1, bytes_per_line))
    unit = next(lines for lines in (unit, PANEL_UNIT, 1) if lines <= largest)
    units = -(-extent // unit)
    count = -(-units // (largest // unit))
    starts = [units * i // count * unit for i in range(count)]
    return list(zip(starts, [*starts[1:], extent], strict=True)) if count else []


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    bias: torch.Tensor | None,
    rounding: str,
    backend: Backend,
) -> torch.Tensor:
    """Y = X Wᵀ + b, [M, N], over row panels of W."""
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] == 0:
        return y
    budget = _workspace_bytes - backend.temporaries(_workspace_bytes)
    panels = split(out_features, in_features * x.itemsize, budget, backend.panel_unit)
    buffer = x.new_empty(max(stop - start for start, stop in panels), in_features)
    for start, stop in panels:
        panel = buffer[: stop - start]
        base = None if weight is None else weight[start:stop]
        backend.effective_weight(panel, base, factors.rows(start, stop), start, 0, rounding, _workspace_bytes)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, panel.t(), out=y[:, start:stop])
    return y


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor | None, factors: Factors, rounding: str, backend: Backend
) -> torch.Tensor:
    """∂X = G W, [M, K], over column panels of W: no accumulation, so no rounding beyond the product's own."""
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    grad_x = grad.new_empty(grad.shape[0], in_features)
    if grad.shape[0] == 0:
        return grad_x
    budget = _workspace_bytes - backend.temporaries(_workspace_bytes)
    panels = split(in_features, out_features * grad.itemsize, budget, backend.panel_unit)
    buffer = grad.new_empty(max(stop - start for start, stop in panels) * out_features)
    for start, stop in panels:
        panel = buffer[: out_features * (stop - start)].view(out_features, stop - start)
        base = None if weight is None else weight[:, start:stop]
        backend.effective_weight(panel, base, factors.columns(start, stop), 0, start, rounding, _workspace_bytes)
        torch.mm(grad, panel, out=grad_x[:, start:stop])
    return grad_x


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    factors: Factors,
    ste: str,
    clip_bound: float,
    gradients: FactorGradients,
    grad_weight: torch.Tensor | None,
    backend: Backend,
) -> None:
    """Accumulate the factors' gradients, and write ∂W0 = H into `grad_weight` if given, over row panels of H = Gᵀ X.

    Each panel of H is complete over all M tokens before it is used, as the clipping estimator needs.
    """
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    dtype = accumulation_dtype(torch.promote_types(x.dtype, factors.A.dtype))
    budget = _workspace_bytes - backend.temporaries(_workspace_bytes)
    cast_budget = 0 if _product_reaches(x, dtype) else budget // 2
    panels = split(out_features, in_features * dtype.itemsize, budget - cast_budget, backend.panel_unit)
    buffer = x.new_empty((max(stop - start for start, stop in panels), in_features), dtype=dtype)
    for start, stop in panels:
        h = buffer[: stop - start]
        _token_product(grad[:, start:stop], x, h, cast_budget)
        if grad_weight is not None:
            grad_weight[start:stop].copy_(h)
        if gradients.wanted:
            part, parts = factors.rows(start, stop), gradients.rows(start, stop)
            backend.factor_gradients(h, part, start, 0, ste, clip_bound, parts, x.dtype, _workspace_bytes)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    rounding: str,
    ste: str,
    clip_bound: float,
    accumulators: FactorGradients,
    grad_weight: torch.Tensor | None,
    backend: Backend,
    shared: SharedProducts,
) -> torch.Tensor:
    """`input_gradient` and `parameter_gradients` over the same column panels, P and Q computed once for both.

    W takes H's place in the panel where they have one dtype.
    """
    out_features, in_features = factors.B.shape[0], factors.A.shape[1]
    dtype = accumulation_dtype(torch.promote_types(x.dtype, factors.A.dtype))
    grad_x = grad.new_empty(grad.shape[0], in_features)
    budget = _workspace_bytes - backend.temporaries(_workspace_bytes)
    cast_budget = 0 if _product_reaches(x, dtype) else budget // 2
    bytes_each = dtype.itemsize + (0 if dtype == grad.dtype else grad.itemsize)
    panels = split(in_features, out_features * bytes_each, budget - cast_budget, backend.panel_unit)
    largest = max(stop - start for start, stop in panels)
    h_buffer = x.new_empty(largest * out_features, dtype=dtype)
    w_buffer = h_buffer if dtype == grad.dtype else grad.new_empty(largest * out_features)
    for start, stop in panels:
        h, w = (buffer[: out_features * (stop - start)].view(out_features, -1) for buffer in (h_buffer, w_buffer))
        _token_product(grad, x[:, start:stop], h, cast_budget)
        if grad_weight is not None:
            grad_weight[:, start:stop].copy_(h)
        shared.weight_and_factor_gradients(
            w,
            None if weight is None else weight[:, start:stop],
            h,
            factors.columns(start, stop),
            0,
            start,
            rounding,
            ste,
            clip_bound,
            accumulators.columns(start, stop),
            _workspace_bytes,
        )
        torch.mm(grad, w, out=grad_x[:, start:stop])
    return grad_x


def write_weight(
    out: torch.Tensor, weight: torch.Tensor | None, factors: Factors, rounding: str, backend: Backend
) -> None:
    """out ← round(W0 + ΔW), over row panels: the bits that `forward` uses in `out`'s dtype. `out` may be `weight`."""
    for start, stop in split(out.shape[0], out.shape[1] * out.itemsize, _workspace_bytes, backend.panel_unit):
        base = None if weight is None else weight[start:stop]
        part = factors.rows(start, stop)
        backend.effective_weight(out[start:stop], base, part, start, 0, rounding, _workspace_bytes)


def first_overflow(weight: torch.Tensor, factors: Factors, rounding: str, backend: Backend) -> tuple[int, int] | None:
    """(row, column) of the first element of W0 that is finite where round(W0 + ΔW) is not; None if there is none."""
    budget = _workspace_bytes - backend.temporaries(_workspace_bytes)
    for start, stop in split(weight.shape[0], weight.shape[1] * weight.itemsize, budget // 2, backend.panel_unit):
        base = weight[start:stop]
        panel = torch.empty(base.shape, dtype=weight.dtype, device=weight.device)
        backend.effective_weight(panel, base, factors.rows(start, stop), start, 0, rounding, _workspace_bytes)
        overflows = (panel.isfinite().logical_not_() & base.isfinite()).nonzero()
        if len(overflows):
            row, column = overflows[0].tolist()
            return start + row, column
    return None


def _product_reaches(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the vendor's product of two `x.dtype` operands can write `dtype` without a rounding in between."""
    return x.dtype == dtype or (x.device.type == "cuda" and dtype == torch.float32)


def _token_product(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, cast_budget: int) -> None:
    """out [n, K] = gradᵀ [n, M] x [M, K], accumulated and returned in `out`'s dtype."""
    if x.dtype == out.dtype:
        torch.mm(grad.t(), x, out=out)
    elif _product_reaches(x, out.dtype):
        torch.ops.aten.mm.dtype_out(grad.t(), x, out.dtype, out=out)
    else:
        out.zero_()
        for start, stop in _token_chunks(x.shape[0], (grad.shape[1] + x.shape[1]) * out.itemsize, cast_budget):
            out.addmm_(grad[start:stop].t().to(out.dtype), x[start:stop].to(out.dtype))


def _token_chunks(tokens: int, bytes_per_token: int, budget: int) -> Iterator[tuple[int, int]]:
    """Token ranges whose widened operands fit in `budget` bytes."""
    yield from split(tokens, bytes_per_token, budget) if tokens else ()
