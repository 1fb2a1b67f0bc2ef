"""Statistics of models spread over processes: each function is one process's part of a test."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dual_lora_kernels.monitoring import DualLoraMonitor, dual_lora_statistics

from .distributed_cases import LAYOUTS, adapted, batch, loss_of
from .exact_adapters import make_exact


def exactly_adapted() -> nn.Module:
    return make_exact(adapted())


def statistics(layout: str) -> tuple[dict[str, float], dict[str, float]]:
    """(of a whole model, of one spread by `layout` after a forward and backward pass)."""
    whole, model = exactly_adapted(), LAYOUTS[layout].spread(exactly_adapted())
    monitor = DualLoraMonitor(model)
    loss_of(model, batch(0)).backward()
    return dual_lora_statistics(whole), monitor.statistics()


def statistics_of_the_older_fsdp() -> tuple[dict[str, float], dict[str, float], str]:
    """(of a whole model, of one whose parameters FSDP1 gathers meanwhile, what is said where they are in parts)."""
    model = FullyShardedDataParallel(exactly_adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        found = dual_lora_statistics(model)
    try:
        dual_lora_statistics(model)
        said = "nothing was raised"
    except ValueError as error:
        said = str(error)
    return dual_lora_statistics(exactly_adapted()), found, said
