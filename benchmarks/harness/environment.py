"""What a result depends on besides its settings. No host names and no paths, so that results can be published."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dual_lora_kernels
from dual_lora_kernels.backends.native import NativeBackend
from dual_lora_kernels.doctor import processor

_AMD_DRIVER = Path("/sys/module/amdgpu/version")
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""Short names of dtypes, on command lines and in file names."""
_BF16_UNITS = {"AMX": torch.cpu._is_amx_tile_supported, "bf16 units": torch.cpu._is_avx512_bf16_supported}


def device_kind(device: torch.device) -> str:
    """A name for files: ``"cpu"``, or the GPU's model in lower case with hyphens."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def load_average() -> float | None:
    """Mean number of runnable processes over the last minute; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """The repository's commit, "+" behind it where tracked code differs; None outside a repository."""
    ask = ["git", "-C", str(root)]
    code = ["dual_lora_kernels", "csrc", "benchmarks", ":(exclude)benchmarks/results"]
    try:
        head = subprocess.run([*ask, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        clean = subprocess.run([*ask, "diff", "--quiet", "HEAD", "--", *code], capture_output=True).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("" if clean else "+")


def instruction_set() -> str:
    """What the processor multiplies with, as far as PyTorch tells: its vectors, and its bf16 units where it has any."""
    vectors = torch.backends.cpu.get_cpu_capability()
    units = [name for name, has in _BF16_UNITS.items() if has()]
    return " with ".join([vectors, *units[:1]])


def memory_gib() -> float | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def installed(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Driver, CUDA or ROCm, memory, processors and clocks (MHz) of a GPU; None elsewhere, as is what cannot be read."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "architecture": getattr(properties, "gcnArchName", "").partition(":")[0]
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        **(_amd_driver(device) if torch.version.hip else _nvidia_driver(properties)),
    }


def _nvidia_driver(properties: Any) -> dict[str, Any]:
    names = {
        "driver": "driver_version",
        "clock": "clocks.sm",
        "memory_clock": "clocks.mem",
        "clock_max": "clocks.max.sm",
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [*query, "-i", f"GPU-{properties.uuid}"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(names)
    return dict(zip(names, (field.strip() for field in answer.split(",")), strict=False))


def _amd_driver(device: torch.device) -> dict[str, Any]:
    try:
        clock: int | None = torch.cuda.clock_rate(device)
    except Exception:  # what amdsmi raises depends on its version, and it may be missing
        clock = None
    driver = _AMD_DRIVER.read_text(encoding="utf-8").strip() if _AMD_DRIVER.exists() else None
    return {"driver": driver, "clock": clock}


def missing_backend(device: torch.device) -> str | None:
    """That ``dual_lora`` is the eager backend on a CPU, and why; None where it is not."""
    reason = NativeBackend().why_unavailable() if device.type == "cpu" else None
    return None if reason is None else f"dual_lora is the eager backend: {reason}"


def environment(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, load, versions and date.

    ``load_average`` is from before the benchmark adds its own: well above 0, it says that the machine was busy.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "gpu": gpu(device),
        "cpu": processor(),
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "memory_gib": memory_gib(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton") or installed("pytorch-triton-rocm"),
        "peft": installed("peft"),
        "transformers": installed("transformers"),
        "dual_lora_kernels": dual_lora_kernels.__version__,
        "commit": commit(),
        "backends": dual_lora_kernels.available_backends(),
    }


def sentence(about: dict[str, Any]) -> str:
    """The environment in one line of Markdown."""
    facts = about["gpu"] or {}
    chip = "".join(f", {name} {facts[name]}" for name in ("driver", "cuda", "rocm") if facts.get(name))
    return (
        f"{about['date']}; {about['device']}{chip} ({about['cpu']}, {about['threads']} of {about['cores']} cores, load "
        f"average {about['load_average']} at the start); Python {about['python']}, torch {about['torch']}, "
        f"triton {about['triton'] or 'missing'}, peft {about['peft'] or 'missing'}, "
        f"dual_lora_kernels {about['dual_lora_kernels']} (backends: {', '.join(about['backends'])})."
    )
