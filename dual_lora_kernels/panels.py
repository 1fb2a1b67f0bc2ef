"""The three passes of a Dual LoRA layer, panel by panel in a bounded workspace.

A backend writes W for a panel of rows (or columns) into a buffer, the vendor's matrix product consumes it, then the
next panel. Neither W nor ΔW nor H is ever whole in memory, and every large product runs at the vendor's speed.
Shapes: X [M, K], G [M, N], W0 [N, K]; M tokens, K = in_features, N = out_features.
"""

from __future__ import annotations

import torch

from .backends import Backend, Block, Estimator, Factors, ParameterGradients, Settings, SharedProducts
from .panel_split import Panels, longest, split, total_waves, waves_for
from .products import product_dtype, token_product, token_product_dtype, token_product_reaches, weight_product


def forward(
    x: torch.Tensor, block: Block, bias: torch.Tensor | None, backend: Backend, settings: Settings
) -> torch.Tensor:
    """Y = X Wᵀ + b, [M, N], over row panels of W."""
    out_features, in_features = block.shape
    dtype, cast_budget, budget = _weight_budget(x, block, backend, settings)
    waves = waves_for(x.device, x.shape[0])
    panels = split(out_features, in_features * dtype.itemsize, budget, backend.panel_unit, waves)
    if len(panels) == 1 and not cast_budget:
        return whole_forward(x, block, bias, backend, settings)
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] == 0:
        return y
    buffer = x.new_empty(longest(panels), in_features, dtype=dtype)
    for start, stop in panels:
        panel = buffer[: stop - start]
        backend.effective_weight(panel, block.rows(start, stop), settings)
        part = None if bias is None else bias[start:stop]
        weight_product(x, panel.t(), part, y[:, start:stop], cast_budget)
    return y


def input_gradient(grad: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> torch.Tensor:
    """∂X = G W, [M, K], over column panels of W: no accumulation, so no rounding beyond the product's own."""
    out_features, in_features = block.shape
    dtype, cast_budget, budget = _weight_budget(grad, block, backend, settings)
    waves = waves_for(grad.device, grad.shape[0])
    panels = split(in_features, out_features * dtype.itemsize, budget, backend.panel_unit, waves)
    if len(panels) == 1 and not cast_budget:
        weight = grad.new_empty(out_features, in_features)
        backend.effective_weight(weight, block, settings)
        return grad @ weight
    grad_x = grad.new_empty(grad.shape[0], in_features)
    if grad.shape[0] == 0:
        return grad_x
    buffer = grad.new_empty(longest(panels) * out_features, dtype=dtype)
    for start, stop in panels:
        panel = _panel(buffer, out_features, stop - start)
        backend.effective_weight(panel, block.columns(start, stop), settings)
        weight_product(grad, panel, None, grad_x[:, start:stop], cast_budget)
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
            token_product(grad[:, start:stop], x, h, cast_budget)
        else:
            own, part = block.columns(start, stop), gradients.columns(start, stop)
            h = _panel(buffer, extent, stop - start)
            token_product(grad, x[:, start:stop], h, cast_budget)
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
    w_dtype = product_dtype(grad.dtype, grad.device.type)
    is_shared = dtype == w_dtype and (block.base is None or backend.reads(block.base))
    bytes_each = dtype.itemsize + (0 if is_shared else w_dtype.itemsize)
    budget -= block.loading_bytes(backend, settings.workspace)
    panels = split(in_features, out_features * bytes_each, budget, backend.panel_unit)
    if len(panels) == 1 and is_shared and not cast_budget:
        return whole_gradients(grad, x, block, estimator, gradients, shared, settings)
    grad_x = grad.new_empty(grad.shape[0], in_features)
    h_buffer = x.new_empty(longest(panels) * out_features, dtype=dtype)
    w_buffer = h_buffer if is_shared else grad.new_empty(longest(panels) * out_features, dtype=w_dtype)
    for start, stop in panels:
        h, w = (_panel(buffer, out_features, stop - start) for buffer in (h_buffer, w_buffer))
        part = gradients.columns(start, stop)
        token_product(grad, x[:, start:stop], h, cast_budget)
        if part.weight is not None:
            part.weight.copy_(h)
        shared.weight_and_factor_gradients(w, h, block.columns(start, stop), estimator, part, settings)
        weight_product(grad, w, None, grad_x[:, start:stop], cast_budget)
    return grad_x


def fits_whole(
    shape: tuple[int, int], dtype: torch.dtype, factors: Factors, backend: Backend, settings: Settings
) -> bool:
    """Whether a CPU's passes take the whole weight as one panel in one dtype: `whole_forward`, `whole_gradients`."""
    device, itemsize, most = factors.A.device.type, dtype.itemsize, settings.workspace
    h_dtype = token_product_dtype(dtype, factors.A.dtype, device, backend.takes_cpu_dtypes)
    temporaries = max(backend.weight_temporaries(most), backend.gradient_temporaries(most, factors))
    in_one_dtype = dtype == product_dtype(dtype, device) == h_dtype
    return (
        device == "cpu"
        and backend.takes_cpu_dtypes
        and in_one_dtype
        and shape[0] * shape[1] * itemsize <= most - temporaries
    )


def whole_forward(
    x: torch.Tensor, block: Block, bias: torch.Tensor | None, backend: Backend, settings: Settings
) -> torch.Tensor:
    """`forward` with one panel, without slices: small layers' time is the host's."""
    weight = torch.empty(block.shape, dtype=x.dtype, device=x.device)
    backend.effective_weight(weight, block, settings)
    return torch.nn.functional.linear(x, weight, bias)


def whole_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    shared: SharedProducts,
    settings: Settings,
) -> torch.Tensor:
    """`gradients` with one panel, in which W takes H's place."""
    h = torch.mm(grad.t(), x)
    if gradients.weight is not None:
        gradients.weight.copy_(h)
    shared.weight_and_factor_gradients(h, h, block, estimator, gradients, settings)
    return torch.mm(grad, h)


def write_weight(out: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> None:
    """out ← round(W0 + ΔW), over row panels: the bits that `forward` uses in `out`'s dtype. `out` may be W0."""
    for start, stop in split(out.shape[0], out.shape[1] * out.itemsize, settings.workspace, backend.panel_unit):
        backend.effective_weight(out[start:stop], block.rows(start, stop), settings)


def first_overflow(
    block: Block, dtype: torch.dtype, backend: Backend, settings: Settings
) -> tuple[int, int, float] | None:
    """(row, column, W0 there) of the first element of W0 that is finite where round(W0 + ΔW) in `dtype` is not.

    None if there is none. `block` has a base.
    """
    assert block.base is not None
    rows, columns = block.shape
    budget = _budget(backend, settings) // 2
    for start, stop in split(rows, columns * dtype.itemsize, budget, backend.panel_unit):
        own = block.rows(start, stop)
        panel = torch.empty(own.shape, dtype=dtype, device=block.base.device)
        backend.effective_weight(panel, own, settings)
        suspects = panel.isfinite().logical_not_()
        if suspects.any():
            assert own.base is not None
            base = torch.empty(own.shape, dtype=own.base.dtype, device=own.base.device)
            own.base.load(base)
            overflows = (suspects & base.to(dtype).isfinite()).nonzero()
            if len(overflows):
                row, column = overflows[0].tolist()
                return start + row, column, base[row, column].item()
    return None


def _budget(backend: Backend, settings: Settings) -> int:
    """Bytes of the workspace for panels of W."""
    return settings.workspace - backend.weight_temporaries(settings.workspace)


def _weight_budget(x: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> tuple[torch.dtype, int, int]:
    """(dtype that panels of W are stored in, bytes for operands cast to it, bytes for panels)."""
    dtype = product_dtype(x.dtype, x.device.type) if backend.takes_cpu_dtypes else x.dtype
    budget = _budget(backend, settings) - block.loading_bytes(backend, settings.workspace)
    cast_budget = 0 if dtype == x.dtype else budget // 2
    return dtype, cast_budget, budget - cast_budget


def _panel(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A panel of rows × columns at the start of a buffer, its rows without gaps."""
    return buffer[: rows * columns].view(rows, columns)


def _token_product_budget(
    x: torch.Tensor, block: Block, backend: Backend, settings: Settings
) -> tuple[torch.dtype, int, int]:
    """(dtype of H, bytes for operands cast to it, bytes for panels)."""
    dtype = token_product_dtype(x.dtype, block.factors.A.dtype, x.device.type, backend.takes_cpu_dtypes)
    budget = settings.workspace - backend.gradient_temporaries(settings.workspace, block.factors)
    cast_budget = 0 if token_product_reaches(x.dtype, dtype, x.device.type) else budget // 2
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
