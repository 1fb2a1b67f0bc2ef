"""Layers for the tests of `DualLoraLinear`."""

from __future__ import annotations

import torch

from dual_lora_kernels import DualLoraLinear, reference
from dual_lora_kernels.self_check.problems import exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]
K, N = 24, 20


def make(
    dtype: torch.dtype = torch.float32, in_features: int = K, out_features: int = N, seed: int = 0, **options: object
) -> DualLoraLinear:
    """A layer whose update is of W0's size, so that nothing passes because the update is negligible."""
    torch.manual_seed(seed)
    options = {"r1": 4, "r2": 3, "alpha": 2.0, "init_std": 0.3} | options
    return DualLoraLinear(in_features, out_features, dtype=dtype, **options)  # type: ignore[arg-type]


def make_exact(
    dtype: torch.dtype = torch.float32, in_features: int = K, out_features: int = N, seed: int = 0, **options: object
) -> DualLoraLinear:
    """A layer of small integers times powers of two: products are exact, and any backend's bits the reference's."""
    layer = make(dtype, in_features, out_features, seed, **options)
    problem = exact(1, out_features, in_features, layer.r1, layer.r2, dtype=dtype, seed=seed)
    with torch.no_grad():
        for name in ("weight", "A", "B", "C", "D"):
            getattr(layer, name).copy_(getattr(problem, name))
    layer.set_scale(problem.scale.item())
    return layer


def expected(layer: DualLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The specification's output for the layer's tensors."""
    return reference.linear(
        x, layer.weight, layer.A, layer.B, layer.C, layer.D, layer.scale, layer.bias,
        ste=layer.ste, rounding=layer.rounding, clip_bound=layer.clip_bound,
    )  # fmt: skip


def effective(layer: DualLoraLinear, dtype: torch.dtype) -> torch.Tensor:
    """The specification's round(W0 + ΔW)."""
    factors = (layer.A, layer.B, layer.C, layer.D, layer.scale)
    return reference.effective_weight(layer.weight, *factors, dtype, layer.rounding).detach()
