"""What is timed: a training step, and greedy generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers.methods import trainable_parameters
from .case import ModelCase
from .subjects import llama


def batch(case: ModelCase) -> torch.Tensor:
    """Tokens [batch, sequence], always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.shape.vocabulary, (case.batch, case.sequence), generator=generator).to(case.device)


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """What transformers' Trainer does in a step: forward, backward, clipping of the norm, AdamW, zeroing.

    Without trainable parameters it is forward and backward alone. Every subject's backward pass reaches the embedded
    tokens, so that all have the same products in the first block.
    """
    parameters = trainable_parameters(model)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    embeddings: Any = llama(model).get_input_embeddings()

    def step() -> None:
        embedded = embeddings(tokens)
        if not embedded.requires_grad:
            embedded.requires_grad_()
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
        if optimiser is not None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()

    return step


def generation(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> Callable[[], torch.Tensor]:
    """Greedy, with a cache of keys and values: [1, prompt] → [1, prompt + new_tokens]."""
    model.eval()
    generate: Any = llama(model).generate
    mask = torch.ones_like(prompt)

    def run() -> torch.Tensor:
        tokens: torch.Tensor = generate(
            prompt, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        return tokens

    return run
