"""Tiny random models for the tests of whole models, and what is often done with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dual_lora_kernels import DualLoraConfig, DualLoraLinear

VOCABULARY = 61


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """2 layers, grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    """2 layers of Conv1D; the output head is tied to the embedding."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def configuration(target_modules: Any = "all-linear", **options: Any) -> DualLoraConfig:
    """Small ranks and an update that is not negligible."""
    return DualLoraConfig(target_modules, **{"r1": 3, "r2": 2, "alpha": 1.0, "init_std": 0.3} | options)


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, DualLoraLinear)}


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


class Block(nn.Module):
    """Attention by nn.MultiheadAttention, and one linear layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.Linear(16, 16)
        self.again = self.up
        self.down = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.again(torch.relu(self.up(x + self.attention(x, x, x)[0]))))
