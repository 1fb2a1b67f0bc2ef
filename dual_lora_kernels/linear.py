"""`DualLoraLinear`: a linear layer with a Dual LoRA adapter, in place of ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn

from .adaptable import is_transposed, linear_features, why_not_adaptable
from .adapter import FACTOR_NAMES, DualLoraAdapter, dual_lora_adapters, plain_modules
from .hooks import call_within_hooks, computing_device, has_aligning_hook, is_offloaded
from .prepared import PreparedWeight, state_of
from .quantised.layers import is_quantised
from .quantised.weight import QuantisedWeight
from .sharding import check_gathered, copy_into, described, is_sharded
from .tensor_parallel import split_adapter
from .transformers_parallel import Rules, rules_of
from .validation import check_dtype, check_positive_int


class DualLoraLinear(DualLoraAdapter):
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
        gradient_columns: the part of Gᵀ X's columns from which the factors' gradients are estimated in training mode,
            a new sample in every call. 1: all, exactly. It can be changed later.
        device, dtype: of the base weight and bias.
        adapter_dtype: of the factors; default fp32 on a bf16 or fp16 base, else the base's dtype.

    Attributes:
        weight, bias, A, B, C, D: parameters; weight is [out_features, in_features], the other way where `transposed`.
        enabled: False in `disable_adapter`: the layer computes x W0ᵀ + b.
        hooked: the layer given to `from_linear` if accelerate's hooks move its inputs or weights, in a tuple.
        rules: those of transformers' tensor parallelism, where it has split the layer given to `from_linear`.
        scale: 0-dim fp32 buffer, changed in place by warm-up and saved with the state. Stays fp32 under ``.to(dtype)``.

    Raises:
        ValueError, TypeError: a size, rank or hyperparameter is out of range; the message names it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    enabled = True
    hooked: tuple[nn.Module, ...] = ()
    rules: Rules | None = None

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
        gradient_columns: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        in_features = check_positive_int("in_features", in_features)
        out_features = check_positive_int("out_features", out_features)
        dtype = dtype or torch.get_default_dtype()
        check_dtype("dtype", dtype)
        super().__init__(
            in_features, out_features, r1=r1, r2=r2, alpha=alpha, dropout=dropout, init_std=init_std, ste=ste,
            rounding=rounding, clip_bound=clip_bound, gradient_columns=gradient_columns, device=device,
            adapter_dtype=default_adapter_dtype(dtype) if adapter_dtype is None else adapter_dtype,
        )  # fmt: skip
        self.transposed = False
        self._unmerged_weight: torch.Tensor | None = None
        self._prepared: PreparedWeight | None = None
        base: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **base), requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **base), requires_grad=False) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> DualLoraLinear:
        """Adapt an ``nn.Linear`` or transformers' Conv1D, sharing its weight and bias (no copy) and freezing them.

        Of a layer that `quantised_weight` reads, it makes a `QuantisedDualLoraLinear`. `options`: the constructor's
        keywords from r1 to gradient_columns, and adapter_dtype. Raises ValueError where the module is no adaptable
        linear layer, with the reason.
        """
        reason = why_not_adaptable(linear)
        if reason is not None:
            raise ValueError(f"linear: got {type(linear).__name__}, expected an adaptable linear layer: {reason}")
        if is_quantised(linear):
            from .quantised_linear import QuantisedDualLoraLinear  # a kind of this class

            return QuantisedDualLoraLinear._around(linear, torch.float32, **options)
        return cls._around(linear, linear.get_parameter("weight").dtype, **options)

    @classmethod
    def _around(cls, linear: nn.Module, dtype: torch.dtype, **options: Any) -> Self:
        """The adapted layer of an adaptable one, whose weight has numbers of `dtype`."""
        layer = cls(*linear_features(linear), bias=False, device="meta", dtype=dtype, **options)
        layer.hooked = (linear,) if has_aligning_hook(linear) else ()  # a tuple, so that it is no submodule
        layer._adopt(linear)
        device = computing_device(linear)
        for name in FACTOR_NAMES:
            setattr(layer, name, nn.Parameter(torch.empty_like(getattr(layer, name), device=device)))
        layer.scale = torch.empty_like(layer.scale, device=device)
        layer.reset_adapter_parameters()
        layer.rules = rules_of(linear)
        if layer.rules is not None:
            split_adapter(layer, layer.rules.split)
        return layer.train(linear.training)

    def _adopt(self, linear: nn.Module) -> None:
        """Take over the base weight and bias, and freeze them."""
        self.transposed = is_transposed(linear)
        self.weight, self.bias = linear.get_parameter("weight"), linear._parameters.get("bias")
        for parameter in (self.weight, self.bias):  # as they are here: init_empty_weights has put others in their place
            if parameter is not None:
                parameter.requires_grad_(False)

    @property
    def merged(self) -> bool:
        """Whether the weight holds W0 + ΔW at present."""
        return self._unmerged_weight is not None

    def reset_parameters(self) -> None:
        """Draw base weight and bias as ``nn.Linear`` does, then the adapter (also after ``to_empty``)."""
        self._unmerged_weight = None
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # it reads weight and bias only
        self.reset_adapter_parameters()

    def _oriented_weight(self) -> torch.Tensor | QuantisedWeight:
        """The base weight as [out_features, in_features]; a view."""
        weight = self._base().weight
        return weight.t() if self.transposed else weight

    def base_device(self) -> torch.device:
        """Where the base weight is; the CPU for one on the meta device."""
        return torch.device("cpu") if self.weight.is_meta else self.weight.device

    def _check_in_memory(self) -> None:
        check_gathered("weight", self.weight)
        if self.weight.is_meta and (self.hooked or hasattr(self, "_hf_hook")):
            raise ValueError(
                "weight is offloaded by accelerate, expected one in memory: load the model without offload"
            )

    def _base(self) -> DualLoraLinear:
        """What holds weight and bias during a call: this layer, or the hooked one that accelerate brings them to."""
        return self.hooked[0] if self.hooked and is_offloaded(self.hooked[0]) else self  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features] in the input's dtype (autocast's where active)."""
        if self.rules is not None:
            return self.rules.call(self, input, self._forward)
        return call_within_hooks(self.hooked, input, self._forward) if self.hooked else self._forward(input)

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = self._base().bias
        if self.merged and self.training and torch.is_grad_enabled() and self.trains():
            raise RuntimeError("DualLoraLinear is merged, so its adapter cannot train: call unmerge() first")
        if self.merged or not self.enabled:
            return self.base_linear(input, self._oriented_weight(), bias)
        weight = None if self._prepared is None else self._prepared_weight(input)
        if weight is not None:
            return nn.functional.linear(input, weight, None if bias is None else bias.to(weight.dtype))
        return self.adapted_linear(input, self._oriented_weight(), bias)

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

        Raises RuntimeError if the layer is merged or its weight sharded, ValueError as `merge` does.
        """
        if self.merged:
            raise RuntimeError("DualLoraLinear is merged: there is nothing to prepare")
        self._check_in_memory()
        if is_sharded(self.weight):
            raise RuntimeError(f"weight is sharded ({described(self.weight)}), so no copy can be kept: call merge()")
        self._keep(self._merged_copy())

    def _keep(self, weight: torch.Tensor) -> None:
        self._prepared = PreparedWeight(weight, state_of(self._sources()))

    def _merged_copy(self) -> torch.Tensor:
        """round(W0 + ΔW) [out_features, in_features] as a new tensor."""
        weight = self._dense_weight().clone(memory_format=torch.contiguous_format)
        self.merge_into(weight)
        return weight

    def _dense_weight(self) -> torch.Tensor:
        """The base weight [out_features, in_features] as a tensor, without a graph."""
        weight = self._oriented_weight()
        assert isinstance(weight, torch.Tensor), "a quantised layer has no dense weight"
        return weight.detach()

    def release(self) -> None:
        """Forget what `prepare` keeps."""
        self._prepared = None

    def _sources(self) -> tuple[torch.Tensor, ...]:
        """What W is made from."""
        return self.weight, self.A, self.B, self.C, self.D, self.scale

    def _prepared_weight(self, input: torch.Tensor) -> torch.Tensor | None:
        """The prepared W where it serves a call on `input`."""
        sources = self._sources()
        drops = self.training and self.dropout.p > 0
        if self._prepared is None or drops or not self._prepared.serves(input, (*sources, self._base().bias)):
            return None
        if not self._prepared.is_current(sources):
            self._prepared = None
            return None
        return self._prepared.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Write round(W0 + ΔW) into the weight, block by block, and keep W0 for `unmerge` in host memory.

        In the weight's dtype these are bit for bit the weights that the forward pass used. Whatever shares the weight
        (the layer given to `from_linear`, say) changes with it; two adapted layers that share one must not both be
        merged. No other thread may run the layer meanwhile: it would compute with a weight that is merged in part. Of a
        sharded weight every process merges its part, with the bits of the whole; all processes have to call this.

        Raises RuntimeError if merged already, ValueError if a factor or the scale is not finite or the merged weight
        would not be, before anything is changed.
        """
        if self.merged:
            raise RuntimeError("DualLoraLinear is merged already: call unmerge() first")
        self._check_in_memory()
        self.release()
        before = self.weight.detach().to("cpu", copy=True)
        self.merge_into(self._dense_weight())
        self._unmerged_weight = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0 bit for bit. Raises RuntimeError unless merged. No other thread may run the layer meanwhile."""
        if self._unmerged_weight is None:
            raise RuntimeError("DualLoraLinear is not merged: there is nothing to unmerge")
        copy_into(self.weight, self._unmerged_weight)
        self._unmerged_weight = None

    @torch.no_grad()
    def check_mergeable(self, dtype: torch.dtype | None = None) -> None:
        """Raise ValueError where `merge` would because of values, or merging in another dtype; no more once merged."""
        if not self.merged:
            self._check_in_memory()
            self.check_merge_into(self._oriented_weight(), dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new, plain ``nn.Linear`` with the merged weight; this layer stays as it is. Raises as `merge` does."""
        self._check_in_memory()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = (
            self._dense_weight().clone(memory_format=torch.contiguous_format) if self.merged else self._merged_copy()
        )
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DualLoraLinear:
        self.release()
        super()._apply(fn, recurse)
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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{super().extra_repr()}" + (", merged" if self.merged else "")
        )


def default_adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The factors' dtype on a base weight of `dtype`: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def dual_lora_layers(model: nn.Module) -> Iterator[tuple[str, DualLoraLinear]]:
    """(name, layer) of every `DualLoraLinear` in `model`, each once, without wrappers' names."""
    for name, module in plain_modules(model):
        if isinstance(module, DualLoraLinear):
            yield name, module


def layers_to(verb: str, model: nn.Module, in_peft: str) -> list[tuple[str, DualLoraLinear]]:
    """`dual_lora_layers`, at least one. ValueError otherwise, which says what to call if PEFT adapted the model."""
    layers = list(dual_lora_layers(model))
    if not layers:
        is_pefts = next(dual_lora_adapters(model), None) is not None
        expected = f"one that apply_dual_lora adapted: PEFT has {in_peft}" if is_pefts else f"some to {verb}"
        raise ValueError(f"model: got {type(model).__name__} without Dual LoRA layers, expected {expected}")
    return layers
