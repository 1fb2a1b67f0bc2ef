"""Triton kernels for NVIDIA and AMD GPUs: W rebuilt tile by tile, in panels or inside the matrix product.

Nothing here imports triton until a call needs it, so the package works where it is not installed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.torch_version import TorchVersion

from ...reference import accumulation_dtype
from ..base import FactorGradients, Factors, FusedPasses

LEAST_TRITON = (3, 6)


class TritonBackend:
    """The backend for GPUs; on a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests."""

    name = "triton"

    def __init__(self) -> None:
        self.fused: FusedPasses | None = TritonFused()

    def unavailable(self) -> str | None:
        return _import_failure()

    def supports(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        from .architecture import architecture

        chip = architecture(device)
        return chip if isinstance(chip, str) else None

    def reserved(self, device: torch.device) -> str | None:
        return "Triton's interpreter is for tests" if device.type == "cpu" else None

    def temporaries(self, workspace: int) -> int:
        # Partial sums of the factor gradients, about half of H's bytes at r1 = r2 = 16; generating W needs none.
        return workspace // 4

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
        from . import execute

        execute.effective_weight(out, weight, factors, row0, col0, rounding)

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
        from . import execute

        budget = self.temporaries(workspace)
        execute.factor_gradients(h, factors, ste, clip_bound, gradients, compute_dtype, budget)


class TritonFused:
    """The passes as one kernel each."""

    def serves(self, operation: str, input: torch.Tensor, factors: Factors, workspace: int) -> str | None:
        from .execute import fused_rank_limit, least_token_product_bytes

        ranks = (factors.A.shape[0], factors.C.shape[0])
        if accumulation_dtype(input.dtype) != accumulation_dtype(factors.A.dtype):
            return f"input of {input.dtype} with factors of {factors.A.dtype} accumulates in two dtypes"
        if max(ranks) > (limit := fused_rank_limit(input)):
            return f"ranks {ranks[0]} and {ranks[1]} exceed {limit}, up to which fused kernels fit this chip"
        if operation == "token_product" and (needed := least_token_product_bytes(input, factors)) > workspace:
            return f"one row of tiles needs {needed} bytes of partial sums, the workspace has {workspace}"
        return None

    def preferred(self, operation: str, input: torch.Tensor) -> bool:
        from .choice import is_fused_faster

        return is_fused_faster(operation, input.shape[0], input.dtype, input.device)

    def weight_product(
        self,
        operation: str,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        factors: Factors,
        bias: torch.Tensor | None,
        rounding: str,
        workspace: int,
    ) -> torch.Tensor:
        from . import execute

        return execute.weight_product(operation, input, weight, factors, bias, rounding, workspace)

    def token_product(
        self,
        grad: torch.Tensor,
        input: torch.Tensor,
        factors: Factors,
        ste: str,
        clip_bound: float,
        gradients: FactorGradients,
        workspace: int,
    ) -> None:
        from . import execute

        execute.token_product(grad, input, factors, ste, clip_bound, gradients, workspace)


@cache
def _import_failure() -> str | None:
    try:
        import triton
    except Exception as error:  # a broken installation must not keep a call from another backend
        return f"triton cannot be imported ({type(error).__name__}: {error}): pip install 'triton>=3.6'"
    if TorchVersion(triton.__version__) < LEAST_TRITON:  # type: ignore[operator]
        return f"triton {triton.__version__} is too old: pip install 'triton>={'.'.join(map(str, LEAST_TRITON))}'"
    return None
