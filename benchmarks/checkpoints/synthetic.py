"""A checkpoint and an adapter of a Llama 3 8B's shapes, of as many of its layers as are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from dual_lora_kernels.adapter import factor_shapes
from dual_lora_kernels.adapter_files import Adapter, write_adapter
from dual_lora_kernels.config import DualLoraConfig
from dual_lora_kernels.safetensors_file import file_header

_KINDS = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
"""Llama 3 8B's, with their [out_features, in_features]."""


def shapes(depth: int) -> dict[str, tuple[int, int]]:
    """The adapted layers of as many of the model's layers."""
    return {f"model.layers.{index}.{kind}": shape for index in range(depth) for kind, shape in _KINDS.items()}


def make_adapter(folder: Path, depth: int, rank: int) -> None:
    """Factors of N(0, 0.02²): ΔW has an rms of a few percent of W0's."""
    torch.manual_seed(0)
    config = DualLoraConfig(r1=rank, r2=rank, adapter_dtype=torch.float32)
    state = {}
    for name, (rows, columns) in shapes(depth).items():
        for factor, shape in factor_shapes(columns, rows, rank, rank).items():
            state[f"{name}.{factor}"] = torch.randn(shape) * 0.02
        state[f"{name}.scale"] = torch.tensor(config.alpha / rank)
    write_adapter(folder, Adapter(dict.fromkeys(shapes(depth), config), state))


def make_base(folder: Path, depth: int) -> None:
    """A file for each of the model's layers. The weights repeat 16 M numbers of N(0, 0.02²), to be quick."""
    folder.mkdir()
    numbers = (torch.randn(2**24) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    files: dict[str, str] = {}
    for index in track(range(depth), "writing the base"):
        own = {f"model.layers.{index}.{kind}.weight": ("BF16", shape) for kind, shape in _KINDS.items()}
        name = f"model-{index + 1:05d}-of-{depth:05d}.safetensors"
        files |= dict.fromkeys(own, name)
        with (folder / name).open("wb") as file:
            file.write(file_header(own, {"format": "pt"}))
            left = 2 * sum(math.prod(shape) for _, shape in own.values())
            for part in _parts(numbers, left):
                file.write(part)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")


def _parts(numbers: bytes, count: int) -> Iterator[bytes]:
    while count > 0:
        yield numbers[: min(count, len(numbers))]
        count -= len(numbers)
