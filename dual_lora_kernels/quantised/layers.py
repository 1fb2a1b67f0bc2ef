"""Linear layers whose weight a library keeps quantised: which these are, what they hold, what they compute in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from ..hooks import has_aligning_hook, move_hook
from . import bitsandbytes, gptq, torchao
from .weight import QuantisedWeight


class _Format(NamedTuple):
    """How one library's layers are told and read."""

    is_one: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    read: Callable[[nn.Module], QuantisedWeight]


_FORMATS = (
    _Format(bitsandbytes.is_four_bit, bitsandbytes.why_not_four_bit, bitsandbytes.read_four_bit),
    _Format(bitsandbytes.is_eight_bit, bitsandbytes.why_not_eight_bit, bitsandbytes.read_eight_bit),
    _Format(torchao.is_torchaos, torchao.why_not_torchaos, torchao.read_torchaos),
    _Format(gptq.is_gptqs, gptq.why_not_gptqs, gptq.read_gptqs),
)


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of one of the quantisation libraries that are known here."""
    return _format(module) is not None


def why_not_readable(module: nn.Module) -> str | None:
    """Why the weight of a quantised layer cannot be read by rows and columns now; None if it can."""
    known = _format(module)
    return "its weight is not quantised by a known library" if known is None else known.why_not(module)


def quantised_weight(layer: nn.Module) -> QuantisedWeight:
    """W0 [out_features, in_features] of a quantised linear layer, for `dual_lora_linear`; nothing is copied.

    A weight that bitsandbytes has repacked on a CPU is unpacked in place first.

    Layers: bitsandbytes' Linear4bit (NF4, FP4) and Linear8bitLt, ``nn.Linear`` with torchao's weight-only int8 and
    int4, GPTQ's and AWQ's of GPTQModel. Raises ValueError for others, with the reason.
    """
    known = _format(layer)
    reason = why_not_readable(layer) if known is None else known.why_not(layer)
    if known is None or reason is not None:
        raise ValueError(f"layer: got {type(layer).__name__}, expected a quantised linear layer: {reason}")
    return known.read(layer)


def weight_of(layer: nn.Module) -> torch.Tensor | QuantisedWeight:
    """W0 of a layer that was quantised when it was adapted; a tensor where it has been dequantised since."""
    if type(layer) is nn.Linear and not is_quantised(layer):  # by transformers' model.dequantize()
        return layer.weight.detach()
    return quantised_weight(layer)


def compute_in_own_dtype(
    layer: nn.Module, input: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``compute(input)`` in the dtype that a quantised layer computes in, whatever autocast says; in the input's again.

    bitsandbytes' Linear4bit has such a dtype (``bnb_4bit_compute_dtype``); others compute in the call's, and its
    Linear8bitLt returns the input's as well.
    """
    dtype = bitsandbytes.compute_dtype(layer, input) if bitsandbytes.is_four_bit(layer) else None
    if dtype is None:
        result = compute(input)
        return result.to(input.dtype) if bitsandbytes.is_eight_bit(layer) else result
    device_type = input.device.type
    autocasts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocasts else nullcontext():
        return compute(input.to(dtype)).to(input.dtype)


def plain_layer(layer: nn.Module, weight: torch.Tensor, as_linear: bool = False) -> nn.Module:
    """A plain layer in the place of a quantised one, with this weight [out_features, in_features] and the layer's bias.

    It is an ``nn.Linear``, or, unless `as_linear`, transformers' Conv1D where the quantised layer was one once. It gets
    accelerate's hook.
    """
    out_features, in_features = weight.shape
    bias = layer.bias
    source: type[nn.Module] = getattr(layer, "source_cls", None) or nn.Linear  # where transformers notes it
    with torch.device("meta"):
        if as_linear or issubclass(source, nn.Linear):
            plain: nn.Module = nn.Linear(in_features, out_features, bias is not None)
        else:
            plain, weight = source(out_features, in_features), weight.t().contiguous()
    plain.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if isinstance(bias, torch.Tensor):
        bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    plain.register_parameter("bias", bias)  # type: ignore[arg-type]  # a parameter or None
    move_hook((layer,) if has_aligning_hook(layer) else (), plain)
    return plain.train(layer.training)


def _format(module: nn.Module) -> _Format | None:
    return next((each for each in _FORMATS if each.is_one(module)), None)
