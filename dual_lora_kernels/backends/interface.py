"""What a backend is: two primitives over one block of the weight. Everything above them is device-agnostic."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from .block import Base, Block, Factors, ParameterGradients

PANEL_UNIT = 64
"""`Backend.panel_unit` of backends without a reason for another: GPUs load and multiply unaligned columns slower."""


class DoesNotFit(RuntimeError):
    """The device refused a fused kernel that `FusedPasses.why_not` had admitted, which says so from then on."""


class Estimator(NamedTuple):
    """The straight-through estimator of the sign: ``"clip"`` (to ±`bound`), ``"dorefa"`` or ``"xnor"``."""

    kind: str
    bound: float


class Settings(NamedTuple):
    """How passes run. The forward pass reads the current settings; the backward pass is handed the same ones."""

    strategy: str
    """``"auto"``, ``"fused"`` or ``"panels"``."""
    workspace: int
    """The bound of a call's temporaries, in bytes."""


class FusedPasses(Protocol):
    """Whole passes as single kernels, for backends that have them. X [M, K], G [M, N]. W0 is read where it lies."""

    def why_not(self, operation: str, input: torch.Tensor, block: Block, settings: Settings) -> str | None:
        """Why a pass on `input` (X, or G for ``"input_gradient"``) cannot run fused; None where it can.

        Operations: ``"forward"``, ``"input_gradient"`` and ``"token_product"`` (H and its contraction).
        """

    def preferred(self, operation: str, input: torch.Tensor) -> bool:
        """Whether the pass is expected to be faster fused than over panels."""

    def weight_product(
        self, operation: str, input: torch.Tensor, block: Block, bias: torch.Tensor | None, settings: Settings
    ) -> torch.Tensor:
        """Y = X Wᵀ + b [M, N] for ``"forward"``, ∂X = G W [M, K] for ``"input_gradient"``; `bias` is contiguous.

        Raises `DoesNotFit`, as `token_product` does, before anything is written.
        """

    def token_product(
        self,
        grad: torch.Tensor,
        input: torch.Tensor,
        block: Block,
        estimator: Estimator,
        gradients: ParameterGradients,
        settings: Settings,
    ) -> None:
        """Add the factors' gradients from G and X to `gradients`, as `Backend.factor_gradients` does."""


class SharedProducts(Protocol):
    """Both primitives of a block in one sweep, for backends where that is faster: P and Q are computed once."""

    def weight_and_factor_gradients(
        self,
        out: torch.Tensor,
        h: torch.Tensor,
        block: Block,
        estimator: Estimator,
        gradients: ParameterGradients,
        settings: Settings,
    ) -> None:
        """`Backend.effective_weight` and `Backend.factor_gradients`; `out` may be `h` itself where W0 is not loaded."""


class Backend(Protocol):
    """A set of kernels. `name` is what ``backend=`` and `set_default_backend` accept."""

    name: str

    panel_unit: int
    """Lines at whose multiples panels start where the workspace allows it, since that is what its kernels like."""

    takes_cpu_dtypes: bool
    """Whether `effective_weight` writes 16-bit numbers into fp32, and H may come in a 16-bit compute dtype: what CPUs'
    products need, with units for that dtype or without."""

    wants_threads: bool
    """Whether passes are shared among threads of the package's own, since the backend's operations are small."""

    @property
    def fused(self) -> FusedPasses | None:
        """Whole passes as single kernels, or None where every pass runs over panels."""

    @property
    def shared_products(self) -> SharedProducts | None:
        """Both primitives in one sweep, or None where they are better called one by one."""

    def description(self) -> str:
        """What runs, in a few words, where the backend is available."""

    def why_unavailable(self) -> str | None:
        """What this installation lacks for the backend; None if it is there."""

    def why_not(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        """Why the backend does not serve such a call, in words; None if it does."""

    def why_not_auto(self, device: torch.device) -> str | None:
        """Why ``"auto"`` leaves the backend to users who name it; None if it may choose it for `device`."""

    def reads(self, base: Base) -> bool:
        """Whether its kernels read W0 where it lies, in this form; otherwise W0 is loaded first: see `Block.pieces`."""

    def weight_temporaries(self, workspace: int) -> int:
        """Bytes of the workspace that `effective_weight` needs for itself, besides the block that it writes."""

    def gradient_temporaries(self, workspace: int, factors: Factors) -> int:
        """Bytes of the workspace that `factor_gradients`, or shared products, need for themselves, besides H."""

    def effective_weight(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        """Write W = round(W0 + ΔW) into `out` [n, k], of any strides and the block's dtype, or of fp32 if that is
        narrower: the same numbers, for products that are made in fp32.

        `out` may be W0 itself.
        """

    def factor_gradients(
        self, h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, settings: Settings
    ) -> None:
        """Add one block's contributions to the factors' `gradients`, from its complete H = Gᵀ X [n, k].

        `h` is contiguous, of the gradients' dtype or as `takes_cpu_dtypes` says, and may be overwritten. W0 is not
        read. P and Q are the bits that `effective_weight` uses for the same block, or for the one that this one's
        columns are `drawn` from; in ∂B and ∂D these count by their weights.
        """
