"""What a training step of one subject takes in memory, in a process of its own; what is free, and what is needed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

import dual_lora_kernels

from ..harness.resident_memory import resident_growth, return_pages_at_once
from ..layers.layer_step import FLOOR
from ..layers.memory import peak_temporary_bytes
from ..layers.methods import MERGED, PREPARED
from .base import base_model
from .case import ModelCase
from .quiet import quiet_libraries
from .steps import batch, training_step
from .subjects import FULL, dense, expected_trainable, subject_model

GIBIBYTE = 2**30
_PRELOADED = ["benchmarks.models.memory", "peft"]
_MEMORY_INFORMATION = Path("/proc/meminfo")
_KEPT: Mapping[str, int] = {"naive": 5, "naive_compiled": 3, "dora": 2, "hira": 2, "loha": 2}
"""Tensors of every adapted weight's size and dtype that a method keeps for its backward pass, as measured on
llama-h1024 in fp32; HiRA's and LoHa's one is of fp32 on a bf16 base, too."""
_SPARE = 0.8
"""Part of the free memory that is used: the rest is for activations, and for others."""


def step_memory(case: ModelCase, subject: str) -> dict[str, int]:
    """Bytes of `subject` in a training step, in this process, which should have done nothing else.

    held: the model, its adapters and the optimiser's state, there before the step and after it. peak: the most that
    PyTorch's allocator had handed out at once above that. largest: the largest single allocation. resident: how far
    the process's resident size rose. On CUDA there are held and peak alone, by the caching allocator.
    """
    with quiet_libraries():
        model = subject_model(base_model(dense(case) if subject == FLOOR else case), subject, case)
        step = training_step(model, batch(case))
        step()  # makes the optimiser's state
        found = {"held": _held(model)}
        device = torch.device(case.device)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            step()
            torch.cuda.synchronize(device)
            return {**found, "peak": torch.cuda.max_memory_allocated(device) - before}
        resident = resident_growth(step)
        trace = peak_temporary_bytes(step)
        found |= {"peak": trace.peak, "largest": trace.largest}
        return found if resident is None else {**found, "resident": resident}


def _held(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return sum(tensors.values()) + moments


def step_memory_apart(case: ModelCase, subject: str) -> dict[str, int]:
    """`step_memory` in a fresh process with as many threads as this one.

    Raises:
        BrokenProcessPool: the process died, of memory perhaps.
        RuntimeError: it imported another installation of this package, or PyTorch had no memory left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)  # what takes ten seconds to import is imported once
    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(torch.get_num_threads(),)) as executor:
        return executor.submit(_like_here, case, subject, dual_lora_kernels.__file__).result()


def _like_here(case: ModelCase, subject: str, package: str) -> dict[str, int]:
    """`step_memory`, by the package that the calling process measures: an installed one, or a source tree's."""
    if dual_lora_kernels.__file__ != package:
        raise RuntimeError("the process imported another dual_lora_kernels than this one has")
    return step_memory(case, subject)


def _begin(threads: int) -> None:
    return_pages_at_once()
    torch.set_num_threads(threads)


class Room:
    """What is free of a device's memory, as subjects are taken in that are to be there together."""

    def __init__(self, case: ModelCase) -> None:
        self.case = case
        self.free = None if (free := free_bytes(torch.device(case.device))) is None else free * _SPARE

    def why_not(self, subject: str) -> str | None:
        """Take `subject` in, or say why it does not fit."""
        stays, passes = needed_bytes(self.case, subject)
        if self.free is None:
            return None
        if stays + passes > self.free:
            return (
                f"needs about {(stays + passes) / GIBIBYTE:.1f} GiB beside the others, and {self.free / GIBIBYTE:.1f} "
                f"GiB of this machine's memory are free for it"
            )
        self.free -= stays
        return None


def needed_bytes(case: ModelCase, subject: str) -> tuple[int, int]:
    """About how much a subject keeps, and takes within a step, over what all have: base and activations."""
    itemsize = case.torch_dtype.itemsize
    adapted = sum(n * k for n, k in case.shape.linears) * itemsize
    if subject == FULL:
        return 4 * case.shape.parameters * itemsize, 0  # weights, gradients and two moments
    stays = 4 * 4 * expected_trainable(subject, case) + (adapted if subject in (PREPARED, MERGED) else 0)
    at_once = adapted // case.shape.layers if case.checkpointing else adapted
    return stays, _KEPT.get(subject, 0) * at_once


def free_bytes(device: torch.device) -> int | None:
    """What the system would still give; None where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMORY_INFORMATION.exists():
        return None
    lines = (line.split() for line in _MEMORY_INFORMATION.read_text(encoding="ascii").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
