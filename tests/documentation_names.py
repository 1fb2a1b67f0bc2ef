"""What the examples of the documentation take for granted: a model, batches, arguments of a Trainer, …, all tiny.

An example that does not adapt its model is given an adapted one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import SFTConfig

from dual_lora_kernels import apply_dual_lora

from .models import VOCABULARY, configuration, llama, tokens

_ADAPTS = ("apply_dual_lora(", "get_peft_model(", "peft_config=")
_BRIEFLY: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "bf16": False,
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def checkpoint() -> Path:
    """A model on disk with its tokenizer, in the current folder."""
    folder = Path("checkpoint")
    if not folder.exists():
        llama().save_pretrained(folder)
        words = {f"w{index}": index for index in range(VOCABULARY)}
        words_alone = Tokenizer(WordLevel(words, unk_token="w2"))
        PreTrainedTokenizerFast(
            tokenizer_object=words_alone, pad_token="w0", eos_token="w1", unk_token="w2"
        ).save_pretrained(folder)
    return folder


def names(code: str) -> dict[str, Any]:
    """For an example that runs in one process."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    return {
        "arguments": (SFTConfig if "SFTTrainer" in code else TrainingArguments)("run", **_BRIEFLY),
        "base_model": AutoModelForCausalLM.from_pretrained(checkpoint()),
        "batch": {"input_ids": tokens(), "labels": tokens()},
        "batches": [{"input_ids": tokens(), "labels": tokens()}] * 2,
        "checkpoint": checkpoint(),
        "data": Dataset.from_dict({"input_ids": [row.tolist() for row in tokens(4)]}) if "SFTTrainer" in code else rows,
        "inputs": {"input_ids": tokens(), "max_new_tokens": 2},
        "log": dict,
        "model": model if any(word in code for word in _ADAPTS) else apply_dual_lora(model, configuration()),
        "step": 50,
        "torch": torch,
        "x": torch.randn(3, 64),
    }
