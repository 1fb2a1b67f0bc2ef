"""torchao's weight-only tensors with one integer to an element: Int8Tensor and IntxUnpackedToInt8Tensor (int4, …)."""

from __future__ import annotations

from typing import Any

from torch import nn

from .integers import IntegerLayout, IntegerWeight
from .weight import QuantisedWeight

_READABLE = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_ACTIVATIONS = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")


def is_torchaos(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.Linear`` whose weight is one of torchao's tensors."""
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and type(weight.data).__module__.startswith("torchao.")


def why_not_torchaos(module: Any) -> str | None:
    """Why such a weight cannot be read by rows and columns; None if it can."""
    weight = module.weight.data
    kind = type(weight).__name__
    if weight.is_meta:
        return "weight is on the meta device, and has no numbers yet: load the model first"
    if kind not in _READABLE:
        return f"weight is torchao's {kind}, whose layout is not read; expected {' or '.join(_READABLE)}"
    activations = [name for name in _ACTIVATIONS if getattr(weight, name, None) is not None]
    if activations:
        return f"weight is torchao's {kind} with {activations[0]}: expected a weight-only quantisation"
    return None


def read_torchaos(module: Any) -> QuantisedWeight:
    """W0 in the dtype that it was quantised from."""
    weight = module.weight.data
    scale = weight.scale if weight.scale.dim() == 2 else weight.scale.view(-1, 1)
    tensors = [weight.qdata, scale]
    if weight.zero_point is not None:
        tensors.append(weight.zero_point.view_as(scale))
    (n, k), dtype = weight.qdata.shape, weight.dtype
    rows, columns = (max(1, size // blocks) for size, blocks in zip((n, k), scale.shape, strict=True))
    return IntegerWeight(tensors, IntegerLayout((n, k), 0, 0, dtype, rows, columns, 1.0))
