"""The functional interface: `dual_lora_linear` and its autograd function, the materialised update."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import calls, panels
from .backends import Block, Estimator, Factors, check_backend_name, resolve_backend
from .calls import Call, Options
from .ops import NAMESPACE, parts, whole
from .quantised.weight import QuantisedWeight
from .runtime_settings import current_settings, default_backend
from .validation import (
    ROUNDINGS,
    as_scale_tensor,
    check_choice,
    check_draws,
    check_dtype,
    check_estimator,
    check_factors,
    check_origin,
    check_scale_value,
    check_tensor,
    check_weight,
)

_ops: Any = getattr(torch.ops, NAMESPACE)


class DualLoraFunction(torch.autograd.Function):
    """Y = X round(W0 + ΔW)ᵀ + b for 2-D X, with the gradients of `reference.linear_gradients`.

    Saves the input and the parameters, never anything of the weight's size. Differentiable once. With a `Call` it
    computes directly, without one through the operators.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        estimator: Estimator,
        options: Options,
        call: Call | None,
        layout: str,
        draws: torch.Tensor | None,
        *quantised: torch.Tensor,
    ) -> torch.Tensor:
        # The input is needed for parameters' gradients only; nobody should pay for keeping it otherwise.
        kept_input = input if any(ctx.needs_input_grad[1:6]) else None
        ctx.save_for_backward(kept_input, weight, draws, A, B, C, D, scale, *quantised)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.estimator, ctx.options, ctx.call, ctx.layout = estimator, options, call, layout
        stored = quantised if layout or weight is None else (weight,)
        return _linear(call, options, input, stored, layout, (A, B, C, D, scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        input, weight, draws, *others = ctx.saved_tensors
        factors, quantised = others[:5], others[5:]
        stored = quantised if ctx.layout or weight is None else (weight,)
        needs = ctx.needs_input_grad
        grads: list[torch.Tensor | None] = [None] * 6
        wanted = [needs[0], *needs[2:6], needs[1]]
        if any(wanted):
            if ctx.call is None or _is_observed() or torch.is_grad_enabled() or _autocasts(grad):
                results = _ops.gradients(
                    grad, input, stored, ctx.layout, factors, wanted, *ctx.estimator, draws, *ctx.options
                )
            else:
                results = calls.gradients(
                    ctx.call, grad, input, whole(stored, ctx.layout), factors, wanted, ctx.estimator, draws
                )
            computed = iter(results)
            grads = [next(computed) if want else None for want in wanted]
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if needs[6] else None
        grad_input, grad_A, grad_B, grad_C, grad_D, grad_weight = grads
        constants = [None] * (6 + len(quantised))
        return grad_input, grad_weight, grad_A, grad_B, grad_C, grad_D, grad_bias, *constants


def _linear(
    call: Call | None,
    options: Options,
    input: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    factors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`weight` and `layout` are the `parts` of a weight."""
    out: torch.Tensor
    if call is None:
        out = _ops.linear(input, weight, layout, factors, bias, *options)
    else:
        out = calls.linear(call, input, whole(weight, layout), factors, bias)
    return out


def _is_observed() -> bool:
    """Whether PyTorch's dispatcher has to see the operators: fake tensors, tracing, selective checkpointing."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def _autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast would act on what is called for `tensor`; operators turn it off for themselves."""
    device_type = tensor.device.type
    return torch._C._is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _Checked(NamedTuple):
    """What the checks of a call came to. Calls with the same metadata need no second check."""

    options: Options
    estimator: Estimator
    out_features: int
    call: Call | None
    """None where only the operators can serve the call: tensor subclasses and devices without data."""


_metadata = attrgetter("__class__", "shape", "dtype", "device", "layout")
_checked: dict[tuple[object, ...], _Checked] = {}
_MOST_CHECKED = 4096
"""Kinds of calls remembered; a model has a few for each shape of layer and number of tokens."""


def dual_lora_linear(
    input: torch.Tensor,
    weight: torch.Tensor | QuantisedWeight | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ste: str = "clip",
    rounding: str = "dither",
    backend: str | None = None,
    clip_bound: float = 1.0,
    origin: tuple[int, int] = (0, 0),
    draws: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer with a Dual LoRA update: ``input @ round(weight + ΔW).T + bias`` (arXiv 2512.03402, section 3.1).

    ΔW = scale · max(B A, 0) ⊙ sgn(D C), with sgn(0) = −1, is rebuilt tile by tile in a bounded workspace in every pass
    and never materialised.

    Args:
        input: [..., in_features], fp32, fp64, bf16 or fp16. Its dtype is the compute dtype; under autocast, autocast's.
        weight: W0 [out_features, in_features], any strides, of any of these dtypes; read as it is, never cast whole.
            None computes the update's contribution alone. A `QuantisedWeight` is dequantised block by block.
        A, B: magnitude group, [r1, in_features] and [out_features, r1].
        C, D: direction group, [r2, in_features] and [out_features, r2]. The four share a dtype (fp32 is usual even on a
            bf16 base); their products and gradients accumulate in fp32, in fp64 for fp64 factors.
        scale: s = α/√(r1·r2), a number or a 0-dim fp32/fp64 tensor. Pass a tensor and change it in place to warm up
            without recompiling.
        bias: [out_features] or None.
        ste: gradient of the sign: ``"clip"`` (the paper's), ``"dorefa"`` or ``"xnor"`` (its ablation).
        rounding: of W0 + ΔW to bf16 or fp16: ``"dither"`` keeps updates below half an ulp of W0 alive, unbiased;
            ``"nearest"`` deletes them (docs/numerics.md). fp32 and fp64 round to nearest.
        backend: a name from `available_backends`, ``"auto"``, or None for the default (`set_default_backend`).
        clip_bound: bound of ``ste="clip"``; 1 in the paper. A loss scaled by a GradScaler is clipped scaled.
        origin: (row, column) of this weight's first element in the full weight, where it is a shard of one. The dither
            and the order of additions depend on it, so a shard's W has the full weight's bits.
        draws: int64 [n] from `draw_columns`: the factors' gradients are estimated, without bias, from n columns of Gᵀ X
            that are chosen by these random numbers, with chances in proportion to the norms of the input's columns.
            Gradients of the other columns of A and C are zero. None: from all columns, exactly. Output and input
            gradient are exact either way, and so is everything where the weight itself gets a gradient.

    Returns:
        [..., out_features] in the compute dtype. Differentiable once with respect to every tensor but `scale`.

    Raises:
        ValueError, TypeError: an argument's shape, rank, dtype, device, name or number is not as above; the message
            names the argument, its value and what was expected.
        NotImplementedError: under a functorch transform (vmap, grad, …) or forward-mode differentiation, or from a
            double backward.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "dual_lora_linear does not support functorch transforms (torch.func.grad, vmap, jvp, …): its kernels are "
            "opaque to them. Use autograd's backward, one call per sample where vmap was meant."
        )
    if forward_ad._current_level >= 0 and any(
        isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None
        for t in (input, weight, A, B, C, D, bias)
    ):
        raise NotImplementedError(
            "dual_lora_linear does not support forward-mode differentiation: its kernels would drop the tangent. Use "
            "autograd's backward."
        )
    backend = default_backend() if backend is None else backend
    tensors = (input, weight, A, B, C, D, bias)
    if torch.compiler.is_compiling():
        checked, call = _check(*tensors, draws, ste, rounding, backend, clip_bound, origin), None
        scale = as_scale_tensor(scale, A)
    else:
        if type(scale) is not torch.Tensor:
            check_tensor("A", A)
            scale = as_scale_tensor(scale, A)
        checked = _remembered(*tensors, draws, scale, ste, rounding, backend, clip_bound, origin)
        call = None if _is_observed() or _autocasts(input) else checked.call
    rows = input if call is not None else input.to(compute_dtype(input))
    if rows.dim() != 2:
        rows = rows.reshape(-1, rows.shape[-1])
    stored, layout = parts(weight)
    differentiable = (rows, None if isinstance(weight, QuantisedWeight) else weight, A, B, C, D, bias)
    out: torch.Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        quantised = stored if layout else ()
        out = DualLoraFunction.apply(
            *differentiable, scale, checked.estimator, checked.options, call, layout, draws, *quantised
        )
    else:
        out = _linear(call, checked.options, rows, stored, layout, (A, B, C, D, scale), bias)
    return out if input.dim() == 2 else out.view(*input.shape[:-1], checked.out_features)


def _remembered(
    input: torch.Tensor,
    weight: torch.Tensor | QuantisedWeight | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    bias: torch.Tensor | None,
    draws: torch.Tensor | None,
    scale: torch.Tensor,
    ste: str,
    rounding: str,
    backend: str,
    clip_bound: float,
    origin: tuple[int, int],
) -> _Checked:
    """`_check`, once for all calls whose tensors have the same metadata and whose settings are the same.

    The checks and the choice of a backend took 45 µs of a call, this takes 8 (docs/decisions.md).
    """
    try:
        key: tuple[object, ...] = (
            ste, rounding, backend, clip_bound, type(clip_bound), origin, current_settings(),
            _metadata(input), _metadata(A), _metadata(B), _metadata(C), _metadata(D),
            None if weight is None else _weight_metadata(weight), None if bias is None else _metadata(bias),
            None if draws is None else _metadata(draws), _metadata(scale), scale.requires_grad,
        )  # fmt: skip
        known = _checked.get(key)
    except (AttributeError, RuntimeError, TypeError):  # what is no dense tensor, or no setting: the checks say which
        key, known = (), None
    if known is None:
        known = _check(input, weight, A, B, C, D, bias, draws, ste, rounding, backend, clip_bound, origin)
        as_scale_tensor(scale, A)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        if key:
            _checked[key] = known
    return known


def _weight_metadata(weight: torch.Tensor | QuantisedWeight) -> tuple[object, ...]:
    if isinstance(weight, QuantisedWeight):
        return weight.kind, weight.layout, *map(_metadata, weight.tensors)
    metadata: tuple[object, ...] = _metadata(weight)
    return metadata


def _check(
    input: torch.Tensor,
    weight: torch.Tensor | QuantisedWeight | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    bias: torch.Tensor | None,
    draws: torch.Tensor | None,
    ste: str,
    rounding: str,
    backend: str,
    clip_bound: float,
    origin: tuple[int, int],
) -> _Checked:
    """Check all arguments of `dual_lora_linear` but the scale."""
    clip_bound = check_estimator(ste, clip_bound)
    check_choice("rounding", rounding, ROUNDINGS)
    check_backend_name(backend)
    check_origin(origin)
    in_features, out_features = check_factors(A, B, C, D)
    if weight is not None:
        check_weight(weight, A, in_features, out_features)
    check_tensor("input", input)
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, expected [..., in_features] with in_features = "
            f"{in_features}, from A"
        )
    if input.device != A.device:
        raise ValueError(f"input.device: got {input.device}, expected {A.device}, where A is")
    check_dtype("input.dtype", input.dtype)
    if bias is not None:
        check_tensor("bias", bias)
        check_dtype("bias.dtype", bias.dtype)
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [out_features] = [{out_features}], from B")
        if bias.device != A.device:
            raise ValueError(f"bias.device: got {bias.device}, expected {A.device}, where A is")
    if draws is not None:
        check_draws(draws, A)
    options = Options(rounding, *origin, backend, *current_settings())
    tensors = (input, A, B, C, D, bias, draws, *parts(weight)[0])
    plain = all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    call = None
    if plain and not torch.compiler.is_compiling() and A.device.type != "meta":
        call = options.resolve(A.device, input.dtype, A.dtype)
        factors = Factors(A, B, C, D, A)  # the scale plays no part
        fused, tokens = call.backend.fused, input.numel() // in_features
        has_own_pass = fused is not None and (tokens == 0 or fused.preferred("forward", input.new_empty(tokens, 0)))
        is_read = not isinstance(weight, QuantisedWeight) or call.backend.reads(weight)
        if options.strategy == "auto" and not has_own_pass and is_read:
            shape = out_features, in_features
            call = call._replace(is_whole=panels.fits_whole(shape, input.dtype, factors, call.backend, call.settings))
    return _Checked(options, Estimator(ste, clip_bound), out_features, call)


def compute_dtype(input: torch.Tensor) -> torch.dtype:
    """The dtype that a call on `input` computes in: autocast's where it is active and applies, else the input's."""
    device_type = input.device.type
    if input.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return input.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else input.dtype


@torch.no_grad()
def dual_lora_delta(
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: float | torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    origin: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """ΔW [out_features, in_features] as a tensor, for export and inspection: training never needs it.

    Computed in fp32 (fp64 for fp64 factors) and rounded to nearest to `dtype` (default: the factors'). `origin`: as for
    `dual_lora_linear`. Raises as it does.
    """
    check_factors(A, B, C, D)
    if dtype is not None:
        check_dtype("dtype", dtype)
    check_origin(origin)
    scale = as_scale_tensor(scale, A)
    check_scale_value(scale)
    update = A.new_empty((B.shape[0], A.shape[1]), dtype=dtype)
    chosen = resolve_backend(default_backend(), A.device, update.dtype, A.dtype)
    block = Block(None, Factors(A, B, C, D, scale), "nearest", update.dtype, *origin)
    panels.write_weight(update, block, chosen, current_settings())
    return update
