"""What a backend is: two primitives over one block of the weight. Everything above them is device-agnostic."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

PANEL_UNIT = 64
"""`Backend.panel_unit` of backends without a reason for another: GPUs load and multiply unaligned columns slower."""


class DoesNotFit(RuntimeError):
    """A fused kernel that `FusedPasses.serves` admitted was refused by the device; from then on it says so."""


class Factors(NamedTuple):
    """The four factors of a block: A [r1, k], B [n, r1], C [r2, k], D [n, r2], one dtype, and the scale s (0-dim)."""

    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    scale: torch.Tensor

    def to(self, dtype: torch.dtype) -> Factors:
        """The factors in `dtype`; the scale as it is."""
        A, B, C, D = (factor.to(dtype) for factor in self[:4])
        return Factors(A, B, C, D, self.scale)

    def rows(self, start: int, stop: int) -> Factors:
        """The factors of rows start … stop of the block."""
        return self._replace(B=self.B[start:stop], D=self.D[start:stop])

    def columns(self, start: int, stop: int) -> Factors:
        """The factors of columns start … stop of the block."""
        return self._replace(A=self.A[:, start:stop], C=self.C[:, start:stop])


class FactorGradients(NamedTuple):
    """Accumulators for the factors' gradients, fp32 or fp64; None where a gradient is not wanted."""

    A: torch.Tensor | None
    B: torch.Tensor | None
    C: torch.Tensor | None
    D: torch.Tensor | None

    def rows(self, start: int, stop: int) -> FactorGradients:
        """The accumulators of rows start … stop of the block."""
        return self._replace(
            B=None if self.B is None else self.B[start:stop], D=None if self.D is None else self.D[start:stop]
        )

    def columns(self, start: int, stop: int) -> FactorGradients:
        """The accumulators of columns start … stop of the block."""
        return self._replace(
            A=None if self.A is None else self.A[:, start:stop], C=None if self.C is None else self.C[:, start:stop]
        )

    @property
    def magnitude_wanted(self) -> bool:
        """Whether ∂P is needed."""
        return self.A is not None or self.B is not None

    @property
    def direction_wanted(self) -> bool:
        """Whether ∂Q is needed."""
        return self.C is not None or self.D is not None

    @property
    def wanted(self) -> bool:
        """Whether any gradient is to be computed."""
        return self.magnitude_wanted or self.direction_wanted


class FusedPasses(Protocol):
    """Whole passes as single kernels, for backends that have them. X [M, K], G [M, N]."""

    def serves(self, operation: str, input: torch.Tensor, factors: Factors, workspace: int) -> str | None:
        """None if a pass on `input` (X, or G for ``"input_gradient"``) can run fused, else the reason why not.

        Operations: ``"forward"``, ``"input_gradient"`` and ``"token_product"`` (H and its contraction). `workspace`
        bounds temporaries, in bytes.
        """

    def preferred(self, operation: str, input: torch.Tensor) -> bool:
        """Whether the pass is expected to be faster fused than over panels."""

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
        """Y = X Wᵀ + b [M, N] for ``"forward"``, ∂X = G W [M, K] for ``"input_gradient"``; `bias` is contiguous.

        Raises `DoesNotFit`, as `token_product` does, before anything is written.
        """

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
        """Add the factors' gradients from G and X to `gradients`; `workspace` bounds temporaries, in bytes."""


class SharedProducts(Protocol):
    """Both primitives of a block in one sweep, for backends where that is faster: P and Q are computed once."""

    def weight_and_factor_gradients(
        self,
        out: torch.Tensor,
        weight: torch.Tensor | None,
        h: torch.Tensor,
        factors: Factors,
        row0: int,
        col0: int,
        rounding: str,
        ste: str,
        clip_bound: float,
        gradients: FactorGradients,
        workspace: int,
    ) -> None:
        """`Backend.effective_weight` and `Backend.factor_gradients` of one block; `out` may be `h` itself."""


class Backend(Protocol):
    """A set of kernels. `name` is what ``backend=`` and `set_default_backend` accept."""

    name: str

    panel_unit: int
    """Lines at whose multiples panels start where the workspace allows it, since that is what its kernels like."""

    @property
    def fused(self) -> FusedPasses | None:
        """Whole passes as single kernels, or None where every pass runs over panels."""

    @property
    def shared_products(self) -> SharedProducts | None:
        """Both primitives in one sweep, or None where they are better called one by one."""

    def description(self) -> str:
        """What runs, in a few words, where the backend is available."""

    def unavailable(self) -> str | None:
        """None if this installation has the backend, else what is missing."""

    def supports(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        """None if the backend serves such a call, else the reason why not, in words."""

    def reserved(self, device: torch.device) -> str | None:
        """None if ``"auto"`` may choose the backend for `device`, else why a user has to name it."""

    def temporaries(self, workspace: int) -> int:
        """Bytes of the workspace that the primitives need for themselves, besides the block they read or write."""

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
        """Write round(W0 + ΔW) of one block into `out` [n, k] (any strides; may be `weight` itself).

        `weight` [n, k] may have another dtype than `out`, and is None for the update alone. `row0`, `col0` place the
        block in the full weight, for the dither. `workspace` bounds temporaries, in bytes.
        """

    def factor_gradients(
        self,
        h: torch.Tensor,
        factors: Factors,
        row0: int,
        col0: int,
        ste: str,
        clip_bound: float,
        gradients: FactorGradients,
        compute_dtype: torch.dtype,
        workspace: int,
    ) -> None:
        """Add one block's contributions to `gradients`, from its complete H = Gᵀ X [n, k].

        `h` is contiguous, fp32 or fp64, and may be overwritten. `row0`, `col0` place the block in the full weight.
        `compute_dtype` is that of the forward pass, whose P and Q are to be rebuilt to the bit.
        """
