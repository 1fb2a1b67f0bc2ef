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

from . import calls, panels
from .backends import Estimator, Factors
from .calls import Options
from .quantised.weight import QuantisedWeight
from .validation import check_scale_value

NAMESPACE = "dual_lora_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

# `factors` are A, B, C, D and the scale; `weight` and `layout` are what `parts` makes of a weight.
_OPTIONS = "str rounding, int row0, int col0, str backend, str strategy, int workspace"
_library.define(
    f"linear(Tensor input, Tensor[] weight, str layout, Tensor[] factors, Tensor? bias, {_OPTIONS}) -> Tensor"
)
_library.define(
    "gradients(Tensor grad, Tensor? input, Tensor[] weight, str layout, Tensor[] factors, bool[] wanted, str ste, "
    f"float clip_bound, Tensor? draws, {_OPTIONS}) -> Tensor[]"
)
_library.define(f"merge_(Tensor(a!) weight, Tensor[] factors, {_OPTIONS}) -> ()")


def parts(weight: torch.Tensor | QuantisedWeight | None) -> tuple[tuple[torch.Tensor, ...], str]:
    """A weight as the operators take it: (its tensors, its layout if it is quantised)."""
    if weight is None:
        return (), ""
    return (weight.tensors, weight.encoded_layout) if isinstance(weight, QuantisedWeight) else ((weight,), "")


def whole(tensors: Sequence[torch.Tensor], layout: str) -> torch.Tensor | QuantisedWeight | None:
    """The weight that `parts` took apart."""
    if layout:
        return QuantisedWeight.restored(tensors, layout)
    return tensors[0] if tensors else None


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


@_kernel("linear")
def linear_kernel(
    input: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    factors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    """`calls.linear`."""
    call = Options(*options).resolve(input.device, input.dtype, factors[0].dtype)
    return calls.linear(call, input, whole(weight, layout), factors, bias)


@_fake("linear")
def _(input: torch.Tensor, weight: Any, layout: str, factors: Sequence[torch.Tensor], *others: Any) -> torch.Tensor:
    return input.new_empty(input.shape[0], Factors(*factors).shape[0])


@_kernel("gradients")
def gradients_kernel(
    grad: torch.Tensor,
    input: torch.Tensor | None,
    weight: Sequence[torch.Tensor],
    layout: str,
    factors: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    ste: str,
    clip_bound: float,
    draws: torch.Tensor | None,
    *options: Any,
) -> list[torch.Tensor]:
    """`calls.gradients`."""
    call = Options(*options).resolve(grad.device, grad.dtype, factors[0].dtype)
    estimator = Estimator(ste, clip_bound)
    return calls.gradients(call, grad, input, whole(weight, layout), factors, wanted, estimator, draws)


@_fake("gradients")
def _(
    grad: torch.Tensor,
    input: Any,
    weight: Sequence[torch.Tensor],
    layout: str,
    factors: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    *others: Any,
) -> list[torch.Tensor]:
    results = [grad.new_empty(grad.shape[0], factors[0].shape[1])] if wanted[0] else []
    results += [torch.empty_like(f) for f, want in zip(factors[:4], wanted[1:5], strict=True) if want]
    return [*results, calls.weight_gradient(grad, weight[0])] if wanted[5] else results


@_kernel("merge_")
def merge_kernel(weight: torch.Tensor, factors: Sequence[torch.Tensor], *options: Any) -> None:
    """W0 ← round(W0 + ΔW), in place."""
    call = Options(*options).resolve(weight.device, weight.dtype, factors[0].dtype)
    block = call.block(weight, factors, weight.dtype)
    check_scale_value(block.factors.scale)
    panels.write_weight(weight, block, call.backend, call.settings)
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
