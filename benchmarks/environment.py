"""What a result depends on besides its settings. No host names and no paths, so that results can be published."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dual_lora_kernels

_CPU_INFO = Path("/proc/cpuinfo")
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""Short names of dtypes, on command lines and in file names."""


def cpu_model() -> str:
    """The processor's name; on Linux from /proc, since `platform` knows only the architecture there."""
    if _CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def device_kind(device: torch.device) -> str:
    """A name for files: ``"cpu"``, or the GPU's model in lower case with hyphens."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def load_average() -> float | None:
    """Mean number of runnable processes over the last minute; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def environment(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, load, versions and date.

    ``load_average`` is from before the benchmark adds its own: well above 0, it says that the machine was busy.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "dual_lora_kernels": dual_lora_kernels.__version__,
        "backends": dual_lora_kernels.available_backends(),
    }


def sentence(about: dict[str, Any]) -> str:
    """The environment in one line of Markdown."""
    return (
        f"{about['date']}; {about['device']} ({about['cpu']}, {about['threads']} of {about['cores']} cores, load "
        f"average {about['load_average']} at the start); Python {about['python']}, torch {about['torch']}, "
        f"peft {about['peft']}, dual_lora_kernels {about['dual_lora_kernels']} "
        f"(backends: {', '.join(about['backends'])})."
    )
