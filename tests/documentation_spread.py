"""One process's part of the documentation's examples for several.

An example that does not spread its model is given one that is spread.
"""

from __future__ import annotations

import os
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from dual_lora_kernels import DualLoraWarmup, apply_dual_lora, create_dual_lora_optimizer

from .documents import Example
from .models import configuration, llama, tokens

_SPREADS = ("fully_shard(", "DistributedDataParallel(", "parallelize_dual_lora(")


def run_in(folder: Path, example: Example) -> None:
    """Run it in `folder`, which has the checkpoint."""
    with chdir(folder):
        example.run(spread_names(example.code))


def spread_names(code: str) -> dict[str, Any]:
    """What it takes for granted."""
    model = apply_dual_lora(llama(dtype=torch.bfloat16), configuration())
    if not any(word in code for word in _SPREADS):
        fully_shard(model)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {
        "checkpoint": "checkpoint",
        "data_parallel": 1,
        "device": "cpu",
        "model": model,
        "optimizer": create_dual_lora_optimizer(model, lr=1e-3),
        "step": 3,
        "tensor_parallel": int(os.environ["WORLD_SIZE"]),
        "torch": torch,
        "warmup": DualLoraWarmup(model, 5),
    }
