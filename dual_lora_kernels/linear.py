"""`DualLoraLinear`: a linear layer with a Dual LoRA adapter, in place of ``nn.Linear``."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from .functional import compute_dtype, dual_lora_delta, dual_lora_linear
from .merging import check_mergeable, dual_lora_merge_
from .prepared import PreparedWeight, state_of
from .validation import (
    LARGEST_SCALE,
    SUPPORTED_DTYPES,
    check_dtype,
    check_hyperparameters,
    check_number,
    check_positive_int,
    check_tensor,
)

FACTOR_NAMES = ("A", "B", "C", "D")
_CALL = ("__call__", "_wrapped_call_impl", "_call_impl")
"""The methods of nn.Module between a call and ``forward``."""
_HOOKS = tuple(
    f"_{name}_hooks"
    for name in (
        "forward", "forward_pre", "backward", "backward_pre",
        "state_dict", "state_dict_pre", "load_state_dict_pre", "load_state_dict_post",
    )
)  # fmt: skip


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in_features, out_features]: transformers' Conv1D, as in GPT-2."""
    defining = sys.modules.get("transformers.pytorch_utils")  # who has such a layer has imported it
    return (
        defining is not None and isinstance(module, defining.Conv1D) and type(module).forward is defining.Conv1D.forward
    )


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an adaptable linear layer."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if is_transposed(module) else (columns, rows)


def factor_shapes(in_features: int, out_features: int, r1: int, r2: int) -> dict[str, tuple[int, int]]:
    """The shapes of A, B, C and D."""
    return {"A": (r1, in_features), "B": (out_features, r1), "C": (r2, in_features), "D": (out_features, r2)}


def why_not_adaptable(module: nn.Module) -> str | None:
    """None if `module` is a linear layer that `DualLoraLinear.from_linear` can stand in for, else the reason.

    Adaptable: ``nn.Linear``, transformers' Conv1D, and subclasses that keep their forward, with a floating-point weight
    of the layer's own and nothing beside weight and bias: what is not understood would be dropped silently.
    """
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
        return f"this {kind}'s {names} is computed by a parametrization, which replacing the layer would drop"
    if isinstance(module, DualLoraLinear):
        return "it has a Dual LoRA adapter already"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter would have no effect"
    if not is_transposed(module) and not (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward):
        return f"{kind} is not a linear layer with nn.Linear's forward"
    # accelerate leaves the class's own forward on the instance when it takes its hooks off.
    own_forward = types.MethodType(type(module).forward, module)
    if vars(module).get("forward", own_forward) != own_forward:
        return f"this {kind}'s forward was replaced on the instance (accelerate's hooks and unsloth do that)"
    for name in _CALL:
        if name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name):
            return f"{kind}'s {name} is not nn.Module's, and may do more than forward"
    reason = _why_not_plain(module, "weight") or _why_not_plain(module, "bias")
    if reason is not None:
        return f"{kind}'s {reason}"
    others = [*module._parameters.keys() - {"weight", "bias"}, *module._buffers, *module._modules]
    if others or type(module).get_extra_state is not nn.Module.get_extra_state:
        return f"{kind} has {', '.join(sorted(others)) or 'extra state'} beside weight and bias"
    if any(getattr(module, name) for name in _HOOKS) or hasattr(module, "_hf_hook"):
        return f"this {kind} has hooks, which replacing it would drop; register them afterwards"
    return None


def _why_not_plain(module: nn.Module, name: str) -> str | None:
    """None if the weight or bias that `module` computes with is a dense floating-point parameter, else the reason."""
    parameter = module._parameters.get(name)
    if getattr(module, name, None) is not parameter or (name == "weight" and parameter is None):
        return f"{name} is computed, not a parameter (weight_norm?)"
    if parameter is None:
        return None
    if is_lazy(parameter):
        return f"{name} has no shape yet; run it once first"
    fits = parameter.dim() == 2 if name == "weight" else tuple(parameter.shape) == linear_features(module)[1:]
    if not fits or parameter.dtype not in SUPPORTED_DTYPES:
        return f"{name} is packed or quantised ({parameter.dtype}, shape {tuple(parameter.shape)})"
    if parameter.layout != torch.strided:
        return f"{name} has the layout {parameter.layout}, and is not dense"
    if type(parameter.data) is not torch.Tensor:
        return f"{name} is a {type(parameter.data).__name__}, a tensor subclass (quantised or sharded?)"
    return None


class DualLoraLinear(nn.Module):
    """y = x (W0 + ΔW)ᵀ + b with ΔW = s · max(B A, 0) ⊙ sgn(D C), s = alpha / √(r1·r2).

    A drop-in for ``nn.Linear`` in training code (arXiv 2512.03402, section 3.1). Base weight and bias start frozen;
    set their ``requires_grad`` to train them too. The factors start as Gaussian noise. If they started at zero, no
    gradient would ever reach them, since P ≤ 0 stops the gradients of both groups. The scale has to be warmed up from
    near 0, with `DualLoraWarmup`.

    Args:
        in_features, out_features, bias: as ``nn.Linear``'s.
        r1: rank of the magnitude group A [r1, in_features], B [out_features, r1].
        r2: rank of the direction group C [r2, in_features], D [out_features, r2].
        alpha: numerator of the scale.
        dropout: probability of dropping elements of the adapter's input (in training mode only). With dropout, base and
            update are two products, since they no longer share their input.
        init_std: standard deviation of the factors' initial values.
        ste, clip_bound, rounding: see `dual_lora_linear`.
        device, dtype: of the base weight and bias.
        adapter_dtype: of the factors; default fp32 on a bf16 or fp16 base, else the base's dtype.

    Attributes:
        weight, bias, A, B, C, D: parameters; weight is [out_features, in_features], the other way where `transposed`.
        scale: 0-dim fp32 buffer, changed in place by warm-up and saved with the state. Stays fp32 under ``.to(dtype)``.

    Raises:
        ValueError, TypeError: a size, rank or hyperparameter is out of range; the message names it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    A: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter
    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r1: int = 16,
        r2: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        init_std: float = 0.02,
        ste: str = "clip",
        rounding: str = "dither",
        clip_bound: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check_positive_int("in_features", in_features)
        out_features = check_positive_int("out_features", out_features)
        dtype = dtype or torch.get_default_dtype()
        check_dtype("dtype", dtype)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(dtype, torch.float32)
        check_dtype("adapter_dtype", adapter_dtype)
        check_hyperparameters(
            r1=r1, r2=r2, alpha=alpha, dropout=dropout, init_std=init_std,
            ste=ste, clip_bound=clip_bound, rounding=rounding,
        )  # fmt: skip
        self.in_features, self.out_features, self.transposed = in_features, out_features, False
        self.r1, self.r2, self.alpha, self.init_std = int(r1), int(r2), float(alpha), float(init_std)
        self.ste, self.rounding, self.clip_bound = ste, rounding, float(clip_bound)
        self.dropout = nn.Dropout(float(dropout))
        self._unmerged_weight: torch.Tensor | None = None
        self._prepared: PreparedWeight | None = None

        base: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **base), requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **base), requires_grad=False) if bias else None
        )
        for name, shape in factor_shapes(in_features, out_features, r1, r2).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=adapter_dtype)))
        self.register_buffer("scale", torch.empty((), device=device, dtype=torch.float32))
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> DualLoraLinear:
        """Adapt an ``nn.Linear`` or transformers' Conv1D, sharing its weight and bias (no copy) and freezing them.

        `options`: the constructor's keywords from r1 to clip_bound, and adapter_dtype. Raises ValueError where the
        module is no adaptable linear layer, with the reason.
        """
        reason = why_not_adaptable(linear)
        if reason is not None:
            raise ValueError(f"linear: got {type(linear).__name__}, expected an adaptable linear layer: {reason}")
        weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
        layer = cls(*linear_features(linear), bias=False, device="meta", dtype=weight.dtype, **options)
        layer.transposed = is_transposed(linear)
        layer.weight, layer.bias = weight, bias
        for name in FACTOR_NAMES:
            setattr(layer, name, nn.Parameter(torch.empty_like(getattr(layer, name), device=weight.device)))
        layer.scale = torch.empty_like(layer.scale, device=weight.device)
        layer.reset_adapter_parameters()
        for parameter in (layer.weight, layer.bias):  # not `weight`: init_empty_weights has put another in its place
            if parameter is not None:
                parameter.requires_grad_(False)
        return layer.train(linear.training)

    @property
    def full_scale(self) -> float:
        """alpha / √(r1·r2), where warm-up ends."""
        return self.alpha / math.sqrt(self.r1 * self.r2)

    @property
    def merged(self) -> bool:
        """Whether the weight holds W0 + ΔW at present."""
        return self._unmerged_weight is not None

    def reset_parameters(self) -> None:
        """Draw base weight and bias as ``nn.Linear`` does, then the adapter (also after ``to_empty``)."""
        self._unmerged_weight = None
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # it reads weight and bias only
        self.reset_adapter_parameters()

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Draw the four factors from N(0, init_std²) and set the scale to its full value."""
        for name in FACTOR_NAMES:
            getattr(self, name).normal_(0.0, self.init_std)
        self.scale.fill_(self.full_scale)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set s in place: compiled graphs and captured CUDA graphs see it. ValueError unless it is finite in fp32."""
        self.scale.fill_(check_number("scale", scale, -LARGEST_SCALE, LARGEST_SCALE))

    def _oriented_weight(self) -> torch.Tensor:
        """The base weight as [out_features, in_features]; a view."""
        return self.weight.t() if self.transposed else self.weight

    def _base_linear(self, input: torch.Tensor) -> torch.Tensor:
        """x W0ᵀ + b without the update."""
        check_tensor("input", input)
        dtype = compute_dtype(input)
        if self.weight.dtype == dtype:
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(input.to(dtype), self._oriented_weight(), bias)
        # F.linear would need W0 cast whole, and keep the copy for backward. Panels of W0 + 0 · ΔW are cast one by one.
        A, B, C, D = (getattr(self, name).detach() for name in FACTOR_NAMES)
        no_update = torch.zeros_like(self.scale)
        return dual_lora_linear(
            input, self._oriented_weight(), A, B, C, D, no_update, self.bias, rounding=self.rounding
        )

    def _adapted(self, input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """`dual_lora_linear` with this layer's factors and options."""
        # FSDP's buffer_dtype and the like write buffers without asking the module.
        scale = self.scale
        if scale.dtype != torch.float32:
            scale = scale.to(torch.float32)
        return dual_lora_linear(
            input, weight, self.A, self.B, self.C, self.D, scale, bias,
            ste=self.ste, rounding=self.rounding, clip_bound=self.clip_bound,
        )  # fmt: skip

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features] in the input's dtype (autocast's where active)."""
        if self.merged:
            if self.training and torch.is_grad_enabled() and any(getattr(self, n).requires_grad for n in FACTOR_NAMES):
                raise RuntimeError("DualLoraLinear is merged, so its adapter cannot train: call unmerge() first")
            return self._base_linear(input)
        if self.training and self.dropout.p > 0:
            return self._base_linear(input) + self._adapted(self.dropout(input), None, None)
        weight = None if self._prepared is None else self._prepared_weight(input)
        if weight is not None:
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return nn.functional.linear(input, weight, bias)
        return self._adapted(input, self._oriented_weight(), self.bias)

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has been called, and neither `release` nor a change has ended it."""
        return self._prepared is not None

    @torch.no_grad()
    def prepare(self) -> None:
        """Keep round(W0 + ΔW) in memory, so that calls without gradients take the time of ``nn.Linear``.

        The copy [out_features, in_features] has the weight's dtype, and serves calls that compute in it. All other
        calls run as ever, and so does every call once the weight, a factor or the scale has changed; the log then says
        so. W0 is not touched. `dual_lora_kernels.prepared` does this for a model, in a ``with`` block.

        Raises RuntimeError if the layer is merged, ValueError as `merge` does.
        """
        if self.merged:
            raise RuntimeError("DualLoraLinear is merged: there is nothing to prepare")
        weight = self._oriented_weight().detach().clone(memory_format=torch.contiguous_format)
        self._merge_into(weight)
        self._prepared = PreparedWeight(weight, state_of(self._sources()))

    def release(self) -> None:
        """Forget what `prepare` keeps."""
        self._prepared = None

    def _sources(self) -> tuple[torch.Tensor, ...]:
        """What W is made from."""
        return self.weight, self.A, self.B, self.C, self.D, self.scale

    def _prepared_weight(self, input: torch.Tensor) -> torch.Tensor | None:
        """The prepared W where it serves a call on `input`."""
        sources = self._sources()
        if self._prepared is None or not self._prepared.serves(input, (*sources, self.bias)):
            return None
        if not self._prepared.is_current(sources):
            self._prepared = None
            return None
        return self._prepared.weight

    def delta_weight(self) -> torch.Tensor:
        """ΔW [out_features, in_features] in the factors' dtype, materialised: for inspection and export."""
        return dual_lora_delta(self.A, self.B, self.C, self.D, self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Write round(W0 + ΔW) into the weight, block by block, and keep W0 for `unmerge` in host memory.

        In the weight's dtype these are bit for bit the weights that the forward pass used. Whatever shares the weight
        (the layer given to `from_linear`, say) changes with it; two adapted layers that share one must not both be
        merged. No other thread may run the layer meanwhile: it would compute with a weight that is merged in part.

        Raises RuntimeError if merged already, ValueError if a factor or the scale is not finite or the merged weight
        would not be, before anything is changed.
        """
        if self.merged:
            raise RuntimeError("DualLoraLinear is merged already: call unmerge() first")
        self.release()
        before = self.weight.detach().to("cpu", copy=True)
        self._merge_into(self._oriented_weight().detach())
        self._unmerged_weight = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0 bit for bit. Raises RuntimeError unless merged. No other thread may run the layer meanwhile."""
        if self._unmerged_weight is None:
            raise RuntimeError("DualLoraLinear is not merged: there is nothing to unmerge")
        self.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def _merge_into(self, weight: torch.Tensor) -> None:
        dual_lora_merge_(weight, self.A, self.B, self.C, self.D, self.scale, rounding=self.rounding)

    @torch.no_grad()
    def check_mergeable(self) -> None:
        """Raise ValueError where `merge` would because of values; nothing to check once merged."""
        if not self.merged:
            factors = self.A, self.B, self.C, self.D
            check_mergeable(self._oriented_weight(), *factors, self.scale, rounding=self.rounding)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new, plain ``nn.Linear`` with the merged weight; this layer stays as it is."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self._oriented_weight().detach().clone(memory_format=torch.contiguous_format)
        if not self.merged:
            self._merge_into(weight)
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DualLoraLinear:
        # A bf16 scale would be off by up to 0.4 %, and a warmed-up one by more than a step.
        scale = self.scale
        self.release()
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(device=self.scale.device, dtype=torch.float32)
        if self._unmerged_weight is not None:
            self._unmerged_weight = self._unmerged_weight.to(self.weight.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged_weight is not None:
            # The state is the same whether merged or not, or loading it would apply the update twice.
            destination[prefix + "weight"] = self._unmerged_weight.to(self.weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.scale.dtype != torch.float32:  # load_state_dict(assign=True) of a bf16 copy of the state
            self.scale = self.scale.to(torch.float32)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r1={self.r1}, r2={self.r2}, alpha={self.alpha:g}, ste={self.ste!r}, rounding={self.rounding!r}"
            + (", merged" if self.merged else "")
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, DataParallel, DDP and AveragedModel, whose names have no prefix."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def dual_lora_layers(model: nn.Module) -> Iterator[tuple[str, DualLoraLinear]]:
    """(name, layer) of every Dual LoRA layer in `model`, each once, without wrappers' prefixes in the names."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, DualLoraLinear):
            yield name, module
