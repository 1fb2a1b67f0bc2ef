"""bitsandbytes' layers, and tiny models whose layers it has quantised, for tests of adapted quantised layers."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from .models import VOCABULARY

FORMATS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": True},
}


def four_bit(
    n: int, k: int, form: str = "nf4-double", *, dtype: torch.dtype = torch.bfloat16, blocksize: int = 64,
    compute_dtype: torch.dtype | None = None, bias: bool = True, quantised: bool = True,
    storage: torch.dtype = torch.uint8,
) -> bnb.nn.Linear4bit:  # fmt: skip
    """A Linear4bit of a random weight [n, k] of `dtype`, quantised on the CPU."""
    torch.manual_seed(0)
    options: dict[str, Any] = FORMATS[form] | {"quant_storage": storage}
    layer = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=compute_dtype, **options)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(n, k).to(dtype) / 8, requires_grad=False, blocksize=blocksize, module=layer, **options
    )
    return layer.to("cpu") if quantised else layer


def eight_bit(n: int, k: int, *, bias: bool = True, quantised: bool = True) -> bnb.nn.Linear8bitLt:
    """A Linear8bitLt of a random weight [n, k], quantised on the CPU."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
    return layer.to("cpu") if quantised else layer


def numbers_of(layer: nn.Module) -> torch.Tensor:
    """W0 by the library's own dequantisation."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    state = layer.state if layer.state.SCB is not None else layer.weight
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, state.SCB)


CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-fp32": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@cache
def _checkpoint(gpt2: bool) -> TemporaryDirectory[str]:
    """A local folder with a bf16 model of 2 layers, of sizes that bitsandbytes' CPU kernels serve."""
    torch.manual_seed(0)
    folder = TemporaryDirectory()
    if gpt2:
        small = GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        GPT2LMHeadModel(small).to(torch.bfloat16).save_pretrained(folder.name)
        return folder
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder.name)
    return folder


def quantised_llama(form: str, gpt2: bool = False) -> Any:
    """A small Llama, or GPT-2, quantised by transformers as it loads."""
    folder = _checkpoint(gpt2).name
    if form == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16, device_map="cpu"
        )
    options = {"bnb_4bit_compute_dtype": torch.bfloat16} | CONFIGS[form]
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map="cpu"
    )
