"""Small random models of the families that people fine-tune: the paper's, and the usual ones of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as t
from torch import nn

VOCABULARY = 64
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


class Family(NamedTuple):
    """How to make a model of a family, what to call it with, and its task in PEFT's words."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    task_type: str | None
    targets: str = "all-linear"
    """What to adapt, for LoRA too: PEFT's LoRA takes "all-linear" for Mixtral's 3-D experts as well."""

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same random model at every call, in eval mode."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():  # transformers' 0.02 leaves such small models without a signal
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
        return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 10) -> torch.Tensor:
    """The same random tokens at every call, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def _language() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def _classes() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1])}


def _sequences() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "labels": tokens(2, 6)}


def _images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}


def _speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(2, 8, 32, generator=generator), "labels": tokens(2, 6)}


def _gpt2() -> nn.Module:
    config = t.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model: nn.Module = t.GPT2LMHeadModel(config)
    return model


def _t5() -> nn.Module:
    config = t.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = t.T5ForConditionalGeneration(config)
    return model


def _vit() -> nn.Module:
    config = t.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    model: nn.Module = t.ViTForImageClassification(config)
    return model


def _whisper() -> nn.Module:
    config = t.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=16, max_target_positions=32, decoder_start_token_id=1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = t.WhisperForConditionalGeneration(config)
    return model


class _Experts(nn.Module):
    """A mixture whose experts are linear layers of their own, as in remote-code models and older releases."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, rank = (chosen == index).nonzero(as_tuple=True)
            result = result.index_add(0, rows, expert(x[rows]) * weights[rows, rank, None])
        return result


class SeparateExperts(nn.Module):
    """A small classifier of tokens over such mixtures. An expert can be left without a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(_Experts() for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.embedding(input_ids).flatten(0, -2)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.flatten())
        return t.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def _of(model: type[nn.Module], config: type, **options: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**options))


FAMILIES: dict[str, Family] = {
    "GPT-2": Family(_gpt2, _language, "CAUSAL_LM"),
    "RoBERTa": Family(_of(t.RobertaForSequenceClassification, t.RobertaConfig, **_BERT), _classes, "SEQ_CLS"),
    "DeBERTa": Family(_of(t.DebertaForSequenceClassification, t.DebertaConfig, **_BERT), _classes, "SEQ_CLS"),
    "DeBERTa-v2, v3": Family(
        _of(
            t.DebertaV2ForSequenceClassification,
            t.DebertaV2Config,
            **_BERT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        _classes,
        "SEQ_CLS",
    ),
    "LLaMA-1": Family(
        _of(t.LlamaForCausalLM, t.LlamaConfig, **_LLAMA | {"num_key_value_heads": 4}), _language, "CAUSAL_LM"
    ),
    "LLaMA-2": Family(_of(t.LlamaForCausalLM, t.LlamaConfig, **_LLAMA), _language, "CAUSAL_LM"),
    "LLaMA-3": Family(
        _of(t.LlamaForCausalLM, t.LlamaConfig, **_LLAMA, rope_theta=500000.0, tie_word_embeddings=True),
        _language,
        "CAUSAL_LM",
    ),
    "Qwen2": Family(_of(t.Qwen2ForCausalLM, t.Qwen2Config, **_LLAMA), _language, "CAUSAL_LM"),
    "Qwen3": Family(_of(t.Qwen3ForCausalLM, t.Qwen3Config, **_LLAMA, head_dim=8), _language, "CAUSAL_LM"),
    "Gemma-2": Family(_of(t.Gemma2ForCausalLM, t.Gemma2Config, **_LLAMA, head_dim=8), _language, "CAUSAL_LM"),
    "Gemma-3": Family(_of(t.Gemma3ForCausalLM, t.Gemma3TextConfig, **_LLAMA, head_dim=8), _language, "CAUSAL_LM"),
    "Mistral": Family(_of(t.MistralForCausalLM, t.MistralConfig, **_LLAMA), _language, "CAUSAL_LM"),
    "Mixtral": Family(
        _of(t.MixtralForCausalLM, t.MixtralConfig, **_LLAMA, num_local_experts=4),
        _language,
        "CAUSAL_LM",
        r".*self_attn\.[qkvo]_proj",
    ),
    "separate experts": Family(SeparateExperts, _language, None),
    "T5": Family(_t5, _sequences, "SEQ_2_SEQ_LM"),
    "ViT": Family(_vit, _images, None),
    "Whisper": Family(_whisper, _speech, None),
}
