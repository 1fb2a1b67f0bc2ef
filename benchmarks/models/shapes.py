"""The shapes of models: Meta's of that name, and scaled ones that a CPU trains in seconds."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from transformers import LlamaConfig

SCALED_VOCABULARY = 2048
TINY = "-tiny"
_SCALED = re.compile(r"llama-h([1-9]\d*)")
_HEAD = 64
"""Numbers of a head of the scaled models."""
_TINY_HEAD = 32


@dataclass(frozen=True)
class Shape:
    """What decides how much a Llama computes, and its rotary embedding's settings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    """Whether the output head's weight is the embedding's."""
    rope_factor: float | None = None
    """Of Llama 3.2's longer context; None: the plain rotary embedding."""

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of the seven linear layers of each block, all blocks."""
        key_value = self.hidden // self.heads * self.key_value_heads
        attention = [(self.hidden, self.hidden), (key_value, self.hidden), (key_value, self.hidden)]
        mlp = [(self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate)]
        return [*attention, (self.hidden, self.hidden), *mlp] * self.layers

    @property
    def parameters(self) -> int:
        """Numbers of the frozen model."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + sum(n * k for n, k in self.linears) + (2 * self.layers + 1) * self.hidden

    def config(self) -> Any:
        """The `LlamaConfig`."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
        if self.rope_factor is not None:
            rope |= {
                "rope_type": "llama3", "factor": self.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }  # fmt: skip
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads,
            max_position_embeddings=8192 if self.rope_factor is None else 131072, rms_norm_eps=1e-5,
            tie_word_embeddings=self.tied, rope_parameters=rope, use_cache=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip


REAL = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True, rope_factor=32.0),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256, tied=True, rope_factor=32.0),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, tied=False),
}
"""Meta's, by the numbers of their published ``config.json``."""


def shape(name: str, layers: int | None = None) -> Shape:
    """The shape called `name`: one of ``REAL``, or ``llama-hN`` with hidden size N, a multiple of 64.

    `layers` replaces the number of blocks, which is 8 of the scaled models to hidden size 1024 and 4 above. With
    ``-tiny`` behind the name: a model of that kind that is checked in no time.

    Raises:
        ValueError: there is none of that name.
    """
    if name.endswith(TINY):
        return _tiny(shape(name.removesuffix(TINY)), layers or 2)
    found = _SCALED.fullmatch(name)
    hidden = int(found[1]) if found else 0
    if name in REAL:
        named = REAL[name]
    elif hidden and hidden % _HEAD == 0:
        heads = hidden // _HEAD
        named = Shape(hidden, hidden * 11 // 4, 8 if hidden <= 1024 else 4, heads, heads, SCALED_VOCABULARY, tied=False)
    else:
        raise ValueError(f"model: got {name!r}, expected llama-hN with N a multiple of {_HEAD}, or {', '.join(REAL)}")
    return replace(named, layers=layers or named.layers)


def _tiny(of: Shape, layers: int) -> Shape:
    """Two heads of keys and values, and as many heads for each as `of` has."""
    heads = 2 * of.heads // of.key_value_heads
    hidden = _TINY_HEAD * heads
    return replace(
        of, hidden=hidden, intermediate=4 * hidden, layers=layers, heads=heads, key_value_heads=2, vocabulary=256
    )
