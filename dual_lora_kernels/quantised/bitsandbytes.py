"""bitsandbytes' layers: Linear4bit (NF4, FP4) and Linear8bitLt (LLM.int8)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .four_bit import FourBitLayout, FourBitWeight
from .integers import IntegerLayout, IntegerWeight
from .weight import QuantisedWeight

_NOT_YET = "is not quantised yet: move the layer to its device first, which quantises it (layer.to(device))"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT8 = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""


def is_four_bit(module: nn.Module) -> bool:
    """Whether `module` is a Linear4bit."""
    return _is_a(module, "Linear4bit")


def is_eight_bit(module: nn.Module) -> bool:
    """Whether `module` is a Linear8bitLt."""
    return _is_a(module, "Linear8bitLt")


def _is_a(module: object, name: str) -> bool:
    defining = sys.modules.get("bitsandbytes.nn")  # who has such a layer has imported it
    return defining is not None and isinstance(module, getattr(defining, name))


def why_not_four_bit(module: Any) -> str | None:
    """Why a Linear4bit's weight cannot be read now; None if it can."""
    state, weight = _state(module), module.weight
    if weight.is_meta:
        return "weight is on the meta device, and has no numbers yet: load the model first"
    if state is None or not _is_a(weight, "Params4bit"):
        return f"weight {_NOT_YET}"
    if state.quant_type not in ("nf4", "fp4"):
        return f"weight has the quant_type {state.quant_type!r}, expected 'nf4' or 'fp4'"
    if state.dtype not in _DTYPES:
        return f"weight dequantises to {state.dtype}, expected one of {', '.join(map(str, _DTYPES))}"
    if module.compute_dtype not in (None, *_DTYPES):
        return f"compute_dtype is {module.compute_dtype}, expected one of {', '.join(map(str, _DTYPES))}"
    if state.blocksize % 2:
        return f"weight has the blocksize {state.blocksize}, expected an even one"
    return None


def why_not_eight_bit(module: Any) -> str | None:
    """Why a Linear8bitLt's weight cannot be read now; None if it can."""
    if module.state.has_fp16_weights:
        return "weight is kept in 16 bits (has_fp16_weights=True), and quantised in every call: expected int8 weights"
    if module.weight.is_meta:
        return "weight is on the meta device, and has no numbers yet: load the model first"
    integers, scale = _integers(module)
    if integers.dtype != torch.int8:
        return f"weight {_NOT_YET}"
    return "weight has lost its scales (SCB): load the model again" if scale is None else None


def read_four_bit(module: Any) -> QuantisedWeight:
    """W0 of a Linear4bit, in the dtype that it was quantised from."""
    state = _state(module)
    if getattr(state, "packing_format_for_cpu", False):
        _unpack_for_cpu(module)
        state = _state(module)
    with torch._C.DisableTorchFunctionSubclass():  # plain tensors, and at once
        packed = module.weight.detach().view(-1)
    tensors = [packed if packed.dtype == torch.uint8 else packed.view(torch.uint8), state.code.float()]
    nested_blocksize = 0
    if state.nested:
        nested_blocksize = state.state2.blocksize
        tensors += [
            state.absmax.contiguous(),
            state.state2.code.float(),
            state.state2.absmax.float(),
            state.offset.float(),
        ]
    else:
        tensors.append(state.absmax.float().contiguous())
    n, k = state.shape
    return FourBitWeight(tensors, FourBitLayout((n, k), 0, 0, state.dtype, k, state.blocksize, nested_blocksize))


def read_eight_bit(module: Any) -> QuantisedWeight:
    """W0 of a Linear8bitLt in fp32, as bitsandbytes dequantises it; its own products round the activations as well."""
    integers, scale = _integers(module)
    with torch._C.DisableTorchFunctionSubclass():
        integers = integers.detach()
    n, k = integers.shape
    return IntegerWeight((integers, scale.view(n, 1)), IntegerLayout((n, k), 0, 0, torch.float32, 1, k, _INT8))


def compute_dtype(module: Any, input: torch.Tensor) -> torch.dtype | None:
    """The dtype that a Linear4bit computes in, chosen as it chooses it at its first call."""
    if not module.compute_type_is_set:
        module.set_compute_type(input)
        module.compute_type_is_set = True
    dtype: torch.dtype | None = module.compute_dtype
    return dtype


def kept_state(module: Any) -> tuple[Any, ...]:
    """All that `quantise` replaces, for `restore`."""
    if is_four_bit(module):
        return module.weight, _state(module)
    weight, state = module.weight, module.state
    return weight, weight.CB, weight.SCB, state.CB, state.SCB


def restore(module: Any, kept: tuple[Any, ...]) -> None:
    """Put back what `kept_state` gave."""
    device = module.weight.device
    module.weight, *rest = kept
    if is_four_bit(module):
        module.weight.quant_state = module.quant_state = rest[0]
    else:
        module.weight.CB, module.weight.SCB, module.state.CB, module.state.SCB = rest
    if module.weight.device != device:  # the layer has moved meanwhile
        module.to(device)


def _state(module: Any) -> Any:
    """A Linear4bit's QuantState; the layer has one where the parameter has lost it (FSDP)."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _integers(module: Any) -> tuple[torch.Tensor, Any]:
    """(int8 weight, its scales), which move from the weight to the layer's state at the first call."""
    state, weight = module.state, module.weight
    integers = next((each for each in (state.CB, weight.CB) if each is not None), weight.data)
    return integers, weight.SCB if state.SCB is None else state.SCB


def _unpack_for_cpu(module: Any) -> None:
    """Undo what a call in eval mode does on CPUs with bf16 units: another layout, and absmax rounded to bf16.

    The library's own inverse (0.50.2) leaves an absmax without double quantisation transposed.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight = module.weight
    weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:
        state.absmax = state.absmax.t().reshape(-1).float()
    weight.quant_state = module.quant_state = state


def quantise(module: Any, weight: torch.Tensor) -> None:
    """Give a quantised Linear4bit or Linear8bitLt another weight, quantised with the settings of its own."""
    library: Any = sys.modules["bitsandbytes.nn"]
    old, kept = module.weight, weight.detach().to("cpu")
    if is_four_bit(module):
        module.weight = library.Params4bit(
            kept, requires_grad=False, blocksize=old.blocksize, compress_statistics=old.compress_statistics,
            quant_type=old.quant_type, quant_storage=old.quant_storage, module=module,
        ).to(old.device)  # fmt: skip
        return
    module.state.CB = module.state.SCB = None
    module.weight = library.Int8Params(kept, requires_grad=False, has_fp16_weights=False).to(old.device)
