"""What the tests of merging on disk share: bases and adapters as folders, and what they hold afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, merge_checkpoint, save_dual_lora

from .models import configuration, llama


def save_base(model: Any, folder: Path, shard: str = "20KB") -> Path:
    """A base in several files, with a tokenizer's file and some others beside it."""
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "LICENSE").write_text("mine")
    (folder / "README.md").write_text("# The base")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (folder / ".hidden").write_text("hidden")
    return folder


def load_base(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A checkpoint as users load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_adapter(base: Path, folder: Path, *, seed: int = 1, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """An adapter for a base; the adapted model is returned."""
    model = load_base(base, dtype)
    torch.manual_seed(seed)
    config: DualLoraConfig = configuration(**options)
    apply_dual_lora(model, config)
    save_dual_lora(model, folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, and of those within, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Every parameter has the same bits in both."""
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert equal_bits(parameter.detach(), others[name].detach()), name
    assert len(others) == len(dict(one.named_parameters()))


def save_inputs(folder: Path) -> Path:
    """A base in shards and an adapter for it."""
    save_base(llama(dtype=torch.float16), folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    return folder


def refused(here: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Merging raises, with `message`; all files are as before, and there are no others."""
    before = content(here)
    with pytest.raises(error, match=message):
        merge_checkpoint(here / "base", here / "adapter", here / "out", **options)
    assert content(here) == before
    assert {path.name for path in here.iterdir()} == {"base", "adapter"}
