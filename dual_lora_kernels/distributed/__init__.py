"""Dual LoRA on more than one device: tensor parallelism, checkpoints and merged models of sharded training.

DDP, ``fully_shard``, DeepSpeed and accelerate need nothing from here: adapt the model first, then hand it to them.
docs/distributed.md says how.
"""

from .checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from .merged import save_merged
from .styles import DualLoraColwiseParallel, DualLoraRowwiseParallel, parallelize_dual_lora

__all__ = [
    "DualLoraColwiseParallel",
    "DualLoraRowwiseParallel",
    "latest_checkpoint",
    "load_checkpoint",
    "parallelize_dual_lora",
    "save_checkpoint",
    "save_merged",
]
