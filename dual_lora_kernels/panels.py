"""The three passes of a Dual LoRA layer, panel by panel in a bounded workspace.

A backend writes W for a panel of rows (or columns) into a buffer, the vendor's matrix product consumes it, then the
next panel. Neither W nor ΔW nor H is ever whole in memory, and every large product runs at the vendor's speed.
Shapes: X [M, K], G [M, N], W0 [N, K]; M tokens, K = in_features, N = out_features.
"""

from __future__ import annotations

import torch

from .backends import Backend, Block, Estimator, ParameterGradients, Settings, SharedProducts
from .panel_split import Panels, longest, split, total_waves, waves_for
from .precision import accumulation_dtype


def forward(
    x: torch.Tensor, block: Block, bias: torch.Tensor | None, backend: Backend, settings: Settings
) -> torch.Tensor:
    """Y = X Wᵀ + b, [M, N], over row panels of W."""
    out_features, in_features = block.shape
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] == 0:
        return y
    waves = waves_for(x.device, x.shape[0])
    panels = split(out_features, in_features * x.itemsize, _budget(backend, settings), backend.panel_unit, waves)
    buffer = x.new_empty(longest(panels), in_features)
    for start, stop in panels:
        panel = buffer[: stop - start]
        backend.effective_weight(panel, block.rows(start, stop), settings)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, panel.t(), out=y[:, start:stop])
    return y


def input_gradient(grad: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> torch.Tensor:
    """∂X = G W, [M, K], over column panels of W: no accumulation, so no rounding beyond the product's own."""
    out_features, in_features = block.shape
    grad_x = grad.new_empty(grad.shape[0], in_features)
    if grad.shape[0] == 0:
        return grad_x
    waves = waves_for(grad.device, grad.shape[0])
    panels = split(in_features, out_features * grad.itemsize, _budget(backend, settings), backend.panel_unit, waves)
    buffer = grad.new_empty(longest(panels) * out_features)
    for start, stop in panels:
        panel = _panel(buffer, out_features, stop - start)
        backend.effective_weight(panel, block.columns(start, stop), settings)
        torch.mm(grad, panel, out=grad_x[:, start:stop])
    return grad_x


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    backend: Backend,
    settings: Settings,
) -> None:
    """Accumulate the factors' gradients, and write ∂W0 = H where it is wanted, over panels of H = Gᵀ X.

    Row panels, or column panels where these fill the device's compute units better. Each panel of H is complete over
    all M tokens before it is used, as the clipping estimator needs.
    """
    dtype, cast_budget, budget = _token_product_budget(x, block, backend, settings)
    panels, by_rows = _token_product_panels(x.device, block.shape, dtype.itemsize, budget, backend.panel_unit)
    extent = block.shape[1] if by_rows else block.shape[0]
    buffer = x.new_empty(longest(panels) * extent, dtype=dtype)
    for start, stop in panels:
        if by_rows:
            own, part, h = block.rows(start, stop), gradients.rows(start, stop), _panel(buffer, stop - start, extent)
            _token_product(grad[:, start:stop], x, h, cast_budget)
        else:
            own, part = block.columns(start, stop), gradients.columns(start, stop)
            h = _panel(buffer, extent, stop - start)
            _token_product(grad, x[:, start:stop], h, cast_budget)
        if part.weight is not None:
            part.weight.copy_(h)
        if part.factors_wanted:
            backend.factor_gradients(h, own, estimator, part, settings)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    backend: Backend,
    shared: SharedProducts,
    settings: Settings,
) -> torch.Tensor:
    """`input_gradient` and `parameter_gradients` over the same column panels, P and Q computed once for both.

    W takes H's place in the panel where they have one dtype and W0 need not be loaded.
    """
    out_features, in_features = block.shape
    dtype, cast_budget, budget = _token_product_budget(x, block, backend, settings)
    is_shared = dtype == grad.dtype and not block.needs_loading
    bytes_each = dtype.itemsize + (0 if is_shared else grad.itemsize)
    panels = split(in_features, out_features * bytes_each, budget, backend.panel_unit)
    grad_x = grad.new_empty(grad.shape[0], in_features)
    h_buffer = x.new_empty(longest(panels) * out_features, dtype=dtype)
    w_buffer = h_buffer if is_shared else grad.new_empty(longest(panels) * out_features)
    for start, stop in panels:
        h, w = (_panel(buffer, out_features, stop - start) for buffer in (h_buffer, w_buffer))
        part = gradients.columns(start, stop)
        _token_product(grad, x[:, start:stop], h, cast_budget)
        if part.weight is not None:
            part.weight.copy_(h)
        shared.weight_and_factor_gradients(w, h, block.columns(start, stop), estimator, part, settings)
        torch.mm(grad, w, out=grad_x[:, start:stop])
    return grad_x


def write_weight(out: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> None:
    """out ← round(W0 + ΔW), over row panels: the bits that `forward` uses in `out`'s dtype. `out` may be W0."""
    for start, stop in split(out.shape[0], out.shape[1] * out.itemsize, settings.workspace, backend.panel_unit):
        backend.effective_weight(out[start:stop], block.rows(start, stop), settings)


def first_overflow(weight: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> tuple[int, int] | None:
    """(row, column) of the first element of W0 that is finite where round(W0 + ΔW) is not; None if there is none."""
    budget = _budget(backend, settings) // 2
    for start, stop in split(weight.shape[0], weight.shape[1] * weight.itemsize, budget, backend.panel_unit):
        base = weight[start:stop]
        panel = torch.empty(base.shape, dtype=weight.dtype, device=weight.device)
        backend.effective_weight(panel, block.rows(start, stop), settings)
        overflows = (panel.isfinite().logical_not_() & base.isfinite()).nonzero()
        if len(overflows):
            row, column = overflows[0].tolist()
            return start + row, column
    return None


def _budget(backend: Backend, settings: Settings) -> int:
    """Bytes of the workspace for panels of W."""
    return settings.workspace - backend.weight_temporaries(settings.workspace)


def _panel(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A panel of rows × columns at the start of a buffer, its rows without gaps."""
    return buffer[: rows * columns].view(rows, columns)


def _token_product_budget(
    x: torch.Tensor, block: Block, backend: Backend, settings: Settings
) -> tuple[torch.dtype, int, int]:
    """(dtype of H, bytes for operands cast to it, bytes for panels)."""
    dtype = accumulation_dtype(torch.promote_types(x.dtype, block.factors.A.dtype))
    budget = settings.workspace - backend.gradient_temporaries(settings.workspace, block.factors)
    cast_budget = 0 if _product_reaches(x, dtype) else budget // 2
    return dtype, cast_budget, budget - cast_budget


def _token_product_panels(
    device: torch.device, shape: tuple[int, int], itemsize: int, budget: int, unit: int
) -> tuple[Panels, bool]:
    """(panels of H, whether they are rows): columns only where their products take fewer waves."""
    rows, columns = shape
    row_waves, column_waves = waves_for(device, columns), waves_for(device, rows)
    by_rows = split(rows, columns * itemsize, budget, unit, row_waves)
    if row_waves is None or column_waves is None:
        return by_rows, True
    by_columns = split(columns, rows * itemsize, budget, unit, column_waves)
    if total_waves(by_columns, column_waves) < total_waves(by_rows, row_waves):
        return by_columns, False
    return by_rows, True


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
        for start, stop in split(x.shape[0], (grad.shape[1] + x.shape[1]) * out.itemsize, cast_budget):
            out.addmm_(grad[start:stop].t().to(out.dtype), x[start:stop].to(out.dtype))
