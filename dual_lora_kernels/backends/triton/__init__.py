"""Triton kernels for NVIDIA and AMD GPUs: W rebuilt tile by tile, in panels or inside the matrix product.

Nothing here imports triton until a call needs it, so the package works where it is not installed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.torch_version import TorchVersion

from ...quantised.four_bit import FourBitWeight
from ..block import Base, Block, DenseBase, Factors, ParameterGradients
from ..interface import PANEL_UNIT, Estimator, FusedPasses, Settings, SharedProducts

LEAST_TRITON = (3, 6)


class TritonBackend:
    """The backend for GPUs; on a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests."""

    name = "triton"
    panel_unit = PANEL_UNIT
    takes_cpu_dtypes = False
    wants_threads = False
    shared_products: SharedProducts | None = None

    @property
    def fused(self) -> FusedPasses:
        from . import fused

        return fused

    def why_unavailable(self) -> str | None:
        return _import_failure()

    def description(self) -> str:
        import triton

        return f"Triton {triton.__version__}"

    def why_not(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        from .architecture import architecture

        chip = architecture(device)
        return chip if isinstance(chip, str) else None

    def why_not_auto(self, device: torch.device) -> str | None:
        return "Triton's interpreter is for tests" if device.type == "cpu" else None

    def reads(self, base: Base) -> bool:
        if isinstance(base, FourBitWeight):  # a byte holds two neighbours of one row, and blocks are shifts
            layout = base.layout
            sizes = (layout.blocksize, layout.nested_blocksize)
            are_powers = all(size & (size - 1) == 0 and size != 1 for size in sizes)
            return layout.row_length % 2 == 0 and layout.col0 % 2 == 0 and are_powers
        return isinstance(base, DenseBase)

    def weight_temporaries(self, workspace: int) -> int:
        return 0

    def gradient_temporaries(self, workspace: int, factors: Factors) -> int:
        # Partial sums: (r1 + r2) / 64 of H's bytes for ∂A and ∂C where a tile has 64 rows, and less for ∂B and ∂D. A
        # smaller share than they would like cuts a panel's launches in two, a smaller panel leaves compute units idle.
        share = sum(factors.ranks) / 48
        return int(workspace * min(0.5, share / (1 + share)))

    def effective_weight(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        from . import execute

        for own, part, _ in block.pieces(self, out, block.loading_bytes(self, settings.workspace)):
            execute.effective_weight(part, own)

    def factor_gradients(
        self, h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, settings: Settings
    ) -> None:
        from . import execute

        budget = self.gradient_temporaries(settings.workspace, block.factors)
        execute.factor_gradients(h, block, estimator, gradients, budget)


@cache
def _import_failure() -> str | None:
    try:
        import triton
    except Exception as error:  # a broken installation must not keep a call from another backend
        return f"triton cannot be imported ({type(error).__name__}: {error}): pip install 'triton>=3.6'"
    if TorchVersion(triton.__version__) < LEAST_TRITON:  # type: ignore[operator]
        return f"triton {triton.__version__} is too old: pip install 'triton>={'.'.join(map(str, LEAST_TRITON))}'"
    return None
