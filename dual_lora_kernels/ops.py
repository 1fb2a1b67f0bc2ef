"""The ``torch.library`` operators: what torch.compile, torch.export and checkpointing policies see of the package.

All are opaque to tracing and have fake kernels. They are the layer below `dual_lora_linear`: arguments are not checked
again here, and `linear` itself is not differentiable (`functional.DualLoraFunction` is).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from . import panels, passes
from .backends import FactorGradients, Factors, resolve_backend
from .precision import accumulation_dtype
from .validation import check_scale_value

NAMESPACE = "dual_lora_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

_FACTORS = "Tensor A, Tensor B, Tensor C, Tensor D, Tensor scale"
_library.define(f"linear(Tensor input, Tensor? weight, {_FACTORS}, Tensor? bias, str rounding, str backend) -> Tensor")
_library.define(
    f"gradients(Tensor grad, Tensor? input, Tensor? weight, {_FACTORS}, str ste, float clip_bound, str rounding, "
    "bool[] wanted, ScalarType weight_dtype, str backend) -> Tensor[]"
)
_library.define(f"merge_(Tensor(a!) weight, {_FACTORS}, str rounding, str backend) -> ()")


def _kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an operator's kernel for every device.

    Inside, neither autograd nor autocast acts on the kernel's own calls: autocast would round the factors.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(first: torch.Tensor, *args: Any) -> Any:
            device_type = first.device.type
            autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
            with torch.no_grad(), torch.autocast(device_type, enabled=False) if autocast else nullcontext():
                return function(first, *args)

        torch.library.impl(_library, name, "CompositeExplicitAutograd")(run)
        return run

    return register


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        f"{NAMESPACE}::{name}", lib=_library
    )
    return register


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where BLAS would make one for every panel (expanded or doubly strided operands), else the tensor."""
    return tensor if 1 in tensor.stride() and 0 not in tensor.stride() else tensor.contiguous()


@_kernel("linear")
def linear_kernel(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rounding: str,
    backend: str,
) -> torch.Tensor:
    """Y [M, N] from X [M, K], in X's dtype."""
    check_scale_value(scale)
    chosen = resolve_backend(backend, input.device, input.dtype, A.dtype)
    bias = None if bias is None else bias.to(input.dtype).contiguous()
    return passes.forward(_dense(input), weight, Factors(A, B, C, D, scale), bias, rounding, chosen)


@_fake("linear")
def _(
    input: torch.Tensor, weight: Any, A: Any, B: torch.Tensor, C: Any, D: Any, scale: Any, bias: Any, *options: Any
) -> torch.Tensor:
    return input.new_empty(input.shape[0], B.shape[0])


@_kernel("gradients")
def gradients_kernel(
    grad: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: torch.Tensor,
    ste: str,
    clip_bound: float,
    rounding: str,
    wanted: Sequence[bool],
    weight_dtype: torch.dtype,
    backend: str,
) -> list[torch.Tensor]:
    """The gradients of those of (input, A, B, C, D, weight) that `wanted` marks, in that order, from G [M, N].

    ∂X [M, K] comes in G's dtype, the factors' in theirs, the weight's in `weight_dtype`. `input` may be None where
    only ∂X is wanted.
    """
    chosen = resolve_backend(backend, grad.device, grad.dtype, A.dtype)
    wide = accumulation_dtype(torch.promote_types(grad.dtype, A.dtype))
    accumulators = FactorGradients(
        *(torch.zeros_like(f, dtype=wide) if want else None for f, want in zip((A, B, C, D), wanted[1:5], strict=True))
    )
    grad_weight = grad.new_empty((B.shape[0], A.shape[1]), dtype=weight_dtype) if wanted[5] else None
    grad_input = passes.gradients(
        _dense(grad),
        None if input is None else _dense(input),
        weight,
        Factors(A, B, C, D, scale),
        rounding,
        ste,
        clip_bound,
        accumulators,
        grad_weight,
        wanted[0],
        chosen,
    )
    results = [accumulator.to(A.dtype) for accumulator in accumulators if accumulator is not None]
    return [*([] if grad_input is None else [grad_input]), *results, *([] if grad_weight is None else [grad_weight])]


@_fake("gradients")
def _(
    grad: torch.Tensor,
    input: Any,
    weight: Any,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: Any,
    ste: Any,
    clip_bound: Any,
    rounding: Any,
    wanted: Sequence[bool],
    weight_dtype: torch.dtype,
    backend: Any,
) -> list[torch.Tensor]:
    out_features, in_features = B.shape[0], A.shape[1]
    results = [grad.new_empty(grad.shape[0], in_features)] if wanted[0] else []
    results += [torch.empty_like(f) for f, want in zip((A, B, C, D), wanted[1:5], strict=True) if want]
    return [*results, A.new_empty((out_features, in_features), dtype=weight_dtype)] if wanted[5] else results


@_kernel("merge_")
def merge_kernel(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: torch.Tensor,
    rounding: str,
    backend: str,
) -> None:
    """W0 ← round(W0 + ΔW), in place."""
    check_scale_value(scale)
    chosen = resolve_backend(backend, weight.device, weight.dtype, A.dtype)
    panels.write_weight(weight, weight, Factors(A, B, C, D, scale), rounding, chosen)
    torch.autograd.graph.increment_version(weight)  # kernels write past PyTorch's own counting


@_fake("merge_")
def _(*args: Any) -> None:
    return None


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "dual_lora_linear is differentiable once: its gradients come from a straight-through estimator, whose own "
        "derivative is not defined. Call backward without create_graph=True."
    )


torch.library.register_autograd(f"{NAMESPACE}::gradients", _refuse_double_backward, lib=_library)
