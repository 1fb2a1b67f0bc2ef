"""Two adapters that differ in everything but their ranks, and the processes that save them, for tests of crashes.

No transformers here: each process imports this module.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, dual_lora_state_dict, load_dual_lora, save_dual_lora
from dual_lora_kernels.linear import DualLoraLinear

_OPTIONS: list[dict[str, Any]] = [
    {"alpha": 2.0, "ste": "clip", "rounding": "dither", "clip_bound": 1.0},
    {"alpha": 32.0, "ste": "xnor", "rounding": "nearest", "clip_bound": 0.5},
]
processes = multiprocessing.get_context("forkserver")
"""Its server imports torch once, and forks each process from there in milliseconds."""
processes.set_forkserver_preload([__name__])


def plain() -> nn.Module:
    """A base without an adapter, for 394 KiB of factors, each too small for PyTorch to start threads before a fork."""
    return nn.Sequential(nn.Linear(1024, 8), nn.Linear(8, 1024))


def _adapted(seed: int, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(seed)
    return apply_dual_lora(plain(), DualLoraConfig(r1=24, r2=24, **options))


ADAPTERS = [_adapted(seed, options) for seed, options in enumerate(_OPTIONS)]
"""Made on import, so once for all processes."""


def what(model: nn.Module) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The adapter's settings and values."""
    layers = [module for module in model.modules() if isinstance(module, DualLoraLinear)]
    return [f"{layer!r}, {layer.clip_bound}" for layer in layers], dual_lora_state_dict(model)


def saved(folder: Path) -> int:
    """Which adapter `folder` holds. Raises AssertionError where it is not one of them whole."""
    settings, state = what(load_dual_lora(plain(), folder))
    for which, model in enumerate(ADAPTERS):
        expected_settings, expected = what(model)
        if settings == expected_settings and all(torch.equal(state[name], value) for name, value in expected.items()):
            return which
    raise AssertionError(f"a mixture of two adapters was loaded: {settings}")


def save_in_turn(folder: Path, is_saving: Event) -> None:
    """Save both adapters alternately until killed."""
    for model in cycle(ADAPTERS):
        save_dual_lora(model, folder)
        is_saving.set()


def save_one(folder: Path, which: int, times: int, start: Event) -> None:
    """Save one adapter again and again, from a signal on."""
    start.wait()
    for _ in range(times):
        save_dual_lora(ADAPTERS[which], folder)


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that is killed (SIGKILL) on the way out if it still runs."""
    process = processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
