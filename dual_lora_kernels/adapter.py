"""`DualLoraAdapter`: the factors, scale and options of one layer's update, and what is computed with them.

Both doors use it: `DualLoraLinear` is one with a base weight of its own, and a layer of the PEFT tuner holds one for
each named adapter beside the base layer that it wraps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from . import automatic_warmup, tensor_parallel
from .column_sampling import draw, sample_size
from .functional import compute_dtype, dual_lora_delta, dual_lora_linear
from .merging import check_mergeable, dual_lora_merge_, dual_lora_merged
from .quantised.weight import QuantisedWeight
from .sharding import agree, check_gathered, draw_normal, full, is_sharded, local_block
from .tensor_parallel import FourFactors
from .validation import (
    LARGEST_SCALE,
    check_dtype,
    check_fraction,
    check_hyperparameters,
    check_number,
    check_positive_int,
    check_tensor,
)

FACTOR_NAMES = ("A", "B", "C", "D")
_logger = logging.getLogger("dual_lora_kernels")
_has_warned = False


def factor_shapes(in_features: int, out_features: int, r1: int, r2: int) -> dict[str, tuple[int, int]]:
    """The shapes of A, B, C and D."""
    return {"A": (r1, in_features), "B": (out_features, r1), "C": (r2, in_features), "D": (out_features, r2)}


class DualLoraAdapter(nn.Module):
    """ΔW = s · max(B A, 0) ⊙ sgn(D C) of one linear layer, s = alpha / √(r1·r2), without the layer's weight.

    Args: see `DualLoraLinear`. The factors have no values until `reset_adapter_parameters`.

    Attributes:
        A, B, C, D: parameters.
        scale: 0-dim fp32 buffer, changed in place by warm-up and saved with the state. Stays fp32 under ``.to(dtype)``.

    Raises:
        ValueError, TypeError: a rank or hyperparameter is out of range; the message names it.
    """

    A: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter
    scale: torch.Tensor
    _gradient_columns = 1.0
    _sample_size: int | None = None
    warmup_steps = 0
    warmup_left = 0
    warmup_waits = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r1: int,
        r2: int,
        alpha: float,
        dropout: float,
        init_std: float,
        ste: str,
        rounding: str,
        clip_bound: float,
        gradient_columns: float,
        device: torch.device | str | None,
        adapter_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        check_dtype("adapter_dtype", adapter_dtype)
        check_hyperparameters(
            r1=r1, r2=r2, alpha=alpha, dropout=dropout, init_std=init_std,
            ste=ste, clip_bound=clip_bound, rounding=rounding, gradient_columns=gradient_columns,
        )  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        self.r1, self.r2, self.alpha, self.init_std = int(r1), int(r2), float(alpha), float(init_std)
        self.ste, self.rounding, self.clip_bound = ste, rounding, float(clip_bound)
        self.gradient_columns = gradient_columns
        self.dropout = nn.Dropout(float(dropout))
        for name, shape in factor_shapes(in_features, out_features, r1, r2).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=adapter_dtype)))
        self.register_buffer("scale", torch.empty((), device=device, dtype=torch.float32))

    @property
    def full_scale(self) -> float:
        """alpha / √(r1·r2), where warm-up ends."""
        return self.alpha / math.sqrt(self.r1 * self.r2)

    @property
    def gradient_columns(self) -> float:
        """The part of H's columns from which the factors' gradients are estimated in training mode; 1: all, exactly.

        It can be changed at any time, to 1 for the last steps, say. ValueError unless it is above 0, and 1 at most.
        """
        return self._gradient_columns

    @gradient_columns.setter
    def gradient_columns(self, fraction: float) -> None:
        self._gradient_columns = check_fraction("gradient_columns", fraction)
        # What calls read is an integer: torch.compile makes a symbol of a float that has changed once.
        count = sample_size(self.in_features, fraction)
        self._sample_size = count if count < self.in_features else None

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Draw the four factors from N(0, init_std²) and set the scale to its full value."""
        for name in FACTOR_NAMES:
            draw_normal(getattr(self, name), self.init_std)
        self.scale.fill_(self.full_scale)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set s in place: compiled graphs and captured CUDA graphs see it. ValueError unless it is finite in fp32.

        That ends what `warm_up` began.
        """
        number = check_number("scale", scale, -LARGEST_SCALE, LARGEST_SCALE)
        self.warmup_left = 0
        automatic_warmup.register(self)
        self.scale.fill_(number)

    def adapted_linear(
        self, input: torch.Tensor, weight: torch.Tensor | QuantisedWeight | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x round(W0 + ΔW)ᵀ + b for a base weight [out_features, in_features]; with None, the update's part alone.

        Dropout takes two products, since base and update no longer share their input.
        """
        if self.training and self.dropout.p > 0:
            base = None if weight is None else self.base_linear(input, weight, bias)
            update = self._linear(self.dropout(input), None, None)
            return update if base is None else base + update
        return self._linear(input, weight, bias)

    def base_linear(
        self, input: torch.Tensor, weight: torch.Tensor | QuantisedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x W0ᵀ + b without the update, also where the weight's dtype is another than the input's, or quantised."""
        check_tensor("input", input)
        if is_sharded(self.A):
            return tensor_parallel.linear(self._base_product, input, weight, self._constants(), bias)  # type: ignore[arg-type]
        return self._base_product(input, weight, self._constants(), bias)

    def _constants(self) -> FourFactors:
        """The factors, without a gradient."""
        return self.A.detach(), self.B.detach(), self.C.detach(), self.D.detach()

    def _base_product(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | QuantisedWeight,
        factors: FourFactors,
        bias: torch.Tensor | None,
        origin: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        dtype = compute_dtype(input)
        if isinstance(weight, torch.Tensor) and weight.dtype == dtype:
            return nn.functional.linear(input.to(dtype), weight, None if bias is None else bias.to(dtype))
        # F.linear would need W0 cast whole, and keep the copy for backward. Panels of W0 + 0 · ΔW are cast one by one.
        no_update = torch.zeros_like(self.scale)
        return dual_lora_linear(input, weight, *factors, no_update, bias, rounding=self.rounding, origin=origin)

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor | QuantisedWeight | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # Whether gradients are enabled does not matter: a recomputed forward pass draws what the first one has drawn.
        count = self._sample_size if self.training and self.trains() else None
        if is_sharded(self.A):
            compute, factors = self._product, self.factors()
            return tensor_parallel.linear(compute, input, weight, factors, bias, count)  # type: ignore[arg-type]
        draws = None if count is None else draw(count, self.A.device)
        return self._product(input, weight, self.factors(), bias, draws=draws)

    def _product(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | QuantisedWeight | None,
        factors: FourFactors,
        bias: torch.Tensor | None,
        origin: tuple[int, int] = (0, 0),
        draws: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # FSDP's buffer_dtype and the like write buffers without asking the module.
        scale = self.scale
        if scale.dtype != torch.float32:
            scale = scale.to(torch.float32)
        return dual_lora_linear(
            input, weight, *factors, scale, bias,
            ste=self.ste, rounding=self.rounding, clip_bound=self.clip_bound, origin=origin, draws=draws,
        )  # fmt: skip

    def delta_weight(self) -> torch.Tensor:
        """ΔW [out_features, in_features] in the factors' dtype, materialised: for inspection and export."""
        return dual_lora_delta(*self._whole(), self.scale)

    def merge_into(self, weight: torch.Tensor) -> None:
        """Write round(W0 + ΔW) over a weight [out_features, in_features]; raises as `dual_lora_merge_` does.

        Of a sharded weight every process writes its own part; no part is gathered but of the factors.
        """
        if is_sharded(weight):
            self.check_merge_into(weight)
        own, factors, origin = self._part_for(weight)
        if own.numel():
            dual_lora_merge_(own, *factors, self.scale, rounding=self.rounding, origin=origin)

    def merged_with(self, weight: torch.Tensor | QuantisedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
        """round(W0 + ΔW) as a new tensor, sharded as the weight is; see `dual_lora_merged`."""
        if not is_sharded(weight):
            return dual_lora_merged(weight, *self._whole(), self.scale, dtype=dtype, rounding=self.rounding)
        self.check_merge_into(weight, dtype)
        merged = torch.empty_like(weight, dtype=dtype)
        part, _ = local_block(merged)
        own, factors, origin = self._part_for(weight)
        if own.numel():
            part.copy_(dual_lora_merged(own, *factors, self.scale, dtype=dtype, rounding=self.rounding, origin=origin))
        return merged

    def check_merge_into(self, weight: torch.Tensor | QuantisedWeight, dtype: torch.dtype | None = None) -> None:
        """Raise ValueError where `merge_into`, or `merged_with` in `dtype`, would because of values."""
        own, factors, origin = self._part_for(weight)
        try:
            if not is_sharded(weight) or own.numel():
                check_mergeable(own, *factors, self.scale, dtype=dtype, rounding=self.rounding, origin=origin)
            problem = None
        except ValueError as error:
            problem = str(error)
        if is_sharded(weight):
            problem = agree(problem, weight)
        if problem is not None:
            raise ValueError(problem)

    def _whole(self) -> FourFactors:
        """The factors as plain tensors."""
        for name in FACTOR_NAMES:
            check_gathered(name, getattr(self, name), 2)
        return full(self.A), full(self.B), full(self.C), full(self.D)

    def _part_for(self, weight: Any) -> tuple[Any, FourFactors, tuple[int, int]]:
        """(this process's part of a weight, the factors of that part, its origin). Gathers sharded factors."""
        A, B, C, D = self._whole()
        if not is_sharded(weight):
            return weight, (A, B, C, D), (0, 0)
        own, (row, column) = local_block(weight)
        rows, columns = slice(row, row + own.shape[0]), slice(column, column + own.shape[1])
        return own, (A[:, columns], B[rows], C[:, columns], D[rows]), (row, column)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, B, C and D."""
        return self.A, self.B, self.C, self.D

    def warn_if_narrow(self) -> None:
        """Log, once a process, that factors train in 16 bits: TRL casts those of 4-bit models to bf16, unasked."""
        global _has_warned
        narrow = self.A.dtype.itemsize == 2 and self.training and torch.is_grad_enabled() and self.A.requires_grad
        if narrow and not _has_warned and not torch.compiler.is_compiling():
            _has_warned = True
            _logger.warning(
                "factors train in %s (TRL casts those of 4-bit models): steps below a 500th of a factor are rounded "
                "away; cast the trainable parameters back, parameter.data = parameter.data.float(), before training",
                self.A.dtype,
            )

    def trains(self) -> bool:
        """Whether a factor requires a gradient."""
        return any(factor.requires_grad for factor in self.factors())

    def warm_up(self, steps: int, now: bool = True) -> None:
        """Lower the scale, and let it rise to the full one in the next `steps` steps of the optimiser.

        No call is needed: see `automatic_warmup.start`. `DualLoraWarmup` is for loops that would rather say it.
        """
        automatic_warmup.start(self, check_positive_int("steps", steps), now)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        automatic_warmup.register(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DualLoraAdapter:
        # A bf16 scale would be off by up to 0.4 %, and a warmed-up one by more than a step.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(device=self.scale.device, dtype=torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.scale.dtype != torch.float32:  # load_state_dict(assign=True) of a bf16 copy of the state
            self.scale = self.scale.to(torch.float32)
        if prefix + "scale" in state_dict:
            automatic_warmup.resume(self)

    def extra_repr(self) -> str:
        sampled = "" if self._sample_size is None else f", gradient_columns={self.gradient_columns:g}"
        return (
            f"r1={self.r1}, r2={self.r2}, alpha={self.alpha:g}, ste={self.ste!r}, rounding={self.rounding!r}{sampled}"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, DataParallel, DDP, DeepSpeed's engine and AveragedModel.

    Its names have no prefix.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
            model = model.module  # type: ignore[assignment]
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
"""What activation checkpointing (accelerate's too), torch.compile and FSDP1 put into the names of a model's parts."""


def plain_name(name: str) -> str:
    """The name of a part, without those of the wrappers around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` of the unwrapped model, by `plain_name`: a wrapper has its content's name, and comes first."""
    return ((plain_name(name), module) for name, module in unwrapped(model).named_modules())


def dual_lora_adapters(model: nn.Module) -> Iterator[tuple[str, DualLoraAdapter]]:
    """(name, adapter) of every Dual LoRA adapter in `model`, of either door, each once, without wrappers' names."""
    for name, module in plain_modules(model):
        if isinstance(module, DualLoraAdapter):
            yield name, module
