"""The layer's forward and backward pass from tensors to tensors, with the backend that a call's options resolve to.

PyTorch's dispatcher comes here through the operators of `ops`, and plain calls come here directly (`functional`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import panels, passes, sampled_gradients
from .backends import Backend, Block, Estimator, Factors, ParameterGradients, Settings, base_of, resolve_backend
from .column_sampling import choose
from .precision import accumulation_dtype
from .quantised.weight import QuantisedWeight
from .validation import check_scale_value


class Options(NamedTuple):
    """How a call is computed: the last arguments of every operator. A backward pass is handed its forward pass's.

    `row0` and `col0` place the call's weight in the full one, of which it may be a shard.
    """

    rounding: str
    row0: int
    col0: int
    backend: str
    strategy: str
    workspace: int

    def resolve(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> Call:
        """The options with the backend that serves such a call. Raises as `resolve_backend` does."""
        backend = resolve_backend(self.backend, device, compute_dtype, factor_dtype)
        return Call(self.rounding, self.row0, self.col0, backend, Settings(self.strategy, self.workspace))


class Call(NamedTuple):
    """`Options` once the backend is known."""

    rounding: str
    row0: int
    col0: int
    backend: Backend
    settings: Settings
    is_whole: bool = False
    """Whether the passes go straight to `panels.whole_forward` and, where all is wanted, `whole_gradients`."""

    def block(
        self, weight: torch.Tensor | QuantisedWeight | None, factors: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> Block:
        """The call's weight as one block."""
        return Block(base_of(weight), Factors(*factors), self.rounding, dtype, self.row0, self.col0)


def linear(
    call: Call,
    input: torch.Tensor,
    weight: torch.Tensor | QuantisedWeight | None,
    factors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Y [M, N] from X [M, K], in X's dtype. `factors` are A, B, C, D and the scale.

    Neither autograd nor autocast may act on what is called here: autocast would round the factors.
    """
    block = call.block(weight, factors, input.dtype)
    check_scale_value(block.factors.scale)
    if bias is not None:
        bias = bias.to(input.dtype).contiguous()
    if call.is_whole:
        return panels.whole_forward(_dense(input), block, bias, call.backend, call.settings)
    return passes.forward(_dense(input), block, bias, call.backend, call.settings)


def gradients(
    call: Call,
    grad: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor | QuantisedWeight | None,
    factors: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    estimator: Estimator,
    draws: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradients of those of (input, A, B, C, D, weight) that `wanted` marks, in that order, from G [M, N].

    ∂X [M, K] comes in G's dtype, the parameters' in theirs. `input` may be None where only ∂X is wanted. With `draws`
    [n] the factors' are estimated from as many columns of H, unless ∂W0 is wanted, for which H is computed anyway.
    """
    block = call.block(weight, factors, grad.dtype)
    dtype = block.factors.A.dtype
    wide = accumulation_dtype(torch.promote_types(grad.dtype, dtype))
    grad_weight = weight_gradient(grad, weight) if wanted[5] else None
    targets = ParameterGradients.zeros(block.factors, wanted[1:5], wide, grad_weight)
    grad, rows = _dense(grad), None if input is None else _dense(input)
    shared = call.backend.shared_products
    grad_input: torch.Tensor | None
    if draws is not None and rows is not None and grad_weight is None and targets.factors_wanted:
        grad_input = passes.gradients(grad, None, wanted[0], block, estimator, targets, call.backend, call.settings)
        sampled_gradients.parameter_gradients(
            grad, rows, block, estimator, targets, choose(rows, draws), call.backend, call.settings
        )
    elif call.is_whole and shared is not None and rows is not None and wanted[0] and any(wanted[1:5]):
        grad_input = panels.whole_gradients(grad, rows, block, estimator, targets, shared, call.settings)
    else:
        grad_input = passes.gradients(grad, rows, wanted[0], block, estimator, targets, call.backend, call.settings)
    results = [
        grad_input,
        *(targets[:4] if wide == dtype else [None if each is None else each.to(dtype) for each in targets[:4]]),
        grad_weight,
    ]
    return [each for each in results if each is not None]


def weight_gradient(grad: torch.Tensor, weight: torch.Tensor | QuantisedWeight | None) -> torch.Tensor:
    """Contiguous memory for ∂W0."""
    assert isinstance(weight, torch.Tensor), "a gradient of no weight, or of a quantised one, cannot be wanted"
    return grad.new_empty(weight.shape, dtype=weight.dtype)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where BLAS would make one for every panel (expanded or doubly strided operands), else the tensor."""
    strides = tensor.stride()
    return tensor if 1 in strides and 0 not in strides else tensor.contiguous()
