"""NF4 layers of any size, and every method on one: Dual LoRA, PEFT's QLoRA, and what people do without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit, quantize_blockwise
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from rich.progress import track
from torch import nn

from dual_lora_kernels import DualLoraLinear

from ..layers.methods import ALPHA, NaiveDualLora
from ..layers.methods import METHODS as DENSE_METHODS

_ROWS = 512
"""Rows that are drawn and quantised at a time, so that no dense weight is ever whole."""
_BLOCKSIZE, _NESTED_BLOCKSIZE = 64, 256
LABELS = {
    "qlora": "PEFT QLoRA",
    "naive": "naive Dual LoRA, dequantised in every call",
    "dense": "dual_lora_linear, dequantised by the user",
    "dual_lora": "dual_lora_kernels",
}


def nf4_linear(out_features: int, in_features: int, dtype: torch.dtype, show: bool = False) -> Any:
    """A Linear4bit without bias of W0 ~ N(0, 0.02²), double quantised, computing in `dtype`."""
    with torch.device("meta"):
        layer = Linear4bit(in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    codes, absmax = [], []
    starts = range(0, out_features, _ROWS)
    for start in track(starts, "quantising", disable=not show):
        rows = torch.randn(min(_ROWS, out_features - start), in_features).mul_(0.02).to(dtype)
        packed, state = quantize_4bit(rows, blocksize=_BLOCKSIZE, quant_type="nf4")
        codes.append(packed)
        absmax.append(state.absmax)
    scales = torch.cat(absmax)
    offset = scales.mean()
    nested, state2 = quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCKSIZE)
    state = QuantState(
        absmax=nested, shape=torch.Size((out_features, in_features)), code=get_4bit_type("nf4", device="cpu"),
        blocksize=_BLOCKSIZE, quant_type="nf4", dtype=dtype, offset=offset, state2=state2,
    )  # fmt: skip
    layer.weight = Params4bit(
        torch.cat(codes), requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    return layer.train()


def dequantised(layer: Any) -> torch.Tensor:
    """W0 whole, by the library."""
    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


class NaiveOnDequantised(NaiveDualLora):
    """Naive Dual LoRA on W0 that is dequantised whole in every call, in autograd's sight."""

    def __init__(self, layer: Any, r1: int, r2: int) -> None:
        with torch.device("meta"):
            shape = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.compute_dtype)
        super().__init__(shape, r1, r2)
        del self.weight
        self.base_layer = layer
        for name in ("A", "B", "C", "D"):
            values = torch.empty_like(getattr(self, name), device="cpu").normal_(0.0, 0.02)
            setattr(self, name, nn.Parameter(values))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        self.weight = dequantised(self.base_layer)
        try:
            return super().forward(input)
        finally:
            del self.weight


class DequantisedByTheUser(nn.Module):
    """The way out before quantised layers were read: W0 dequantised whole, then `dual_lora_linear`."""

    def __init__(self, layer: Any, r1: int, r2: int) -> None:
        super().__init__()
        self.base_layer = layer
        with torch.device("meta"):
            shape = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.compute_dtype)
        self.adapter = DualLoraLinear.from_linear(shape, r1=r1, r2=r2, alpha=ALPHA).to_empty(device="cpu")
        self.adapter.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.adapter.reset_adapter_parameters()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        return self.adapter.adapted_linear(input, dequantised(self.base_layer), None)


METHODS: dict[str, Callable[[Any, int, int], nn.Module]] = {
    "qlora": DENSE_METHODS["lora"],
    "naive": NaiveOnDequantised,
    "dense": DequantisedByTheUser,
    "dual_lora": DENSE_METHODS["dual_lora"],
}
"""(quantised layer, r1, r2) → the layer adapted, at equal trainable parameters; they share the quantised weight."""
