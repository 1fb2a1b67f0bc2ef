"""Which backend runs on each device of this machine, and why: `examine` finds out, `render` says it in words."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__
from .backends import Backend, candidates
from .runtime_settings import default_backend, strategy, workspace_bytes

_CPU_INFO = Path("/proc/cpuinfo")
_LAYERS = {
    "bf16": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
"""Compute dtype and factors' dtype of the layers to ask about."""
_VARIABLES = ("DUAL_LORA_CPU_CAPABILITY", "TRITON_INTERPRET")
"""Environment variables that change what runs."""
_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:/|[A-Za-z]:\\)(?:[^\s/\\'\"]+[/\\])+")
"""The folders of an absolute path; not those of an address on the web."""


@dataclass(frozen=True)
class Layers:
    """What happens to layers of some dtypes on a device.

    `reasons` has every backend in order of preference, with None or why it does not serve them; `backend` is the first
    with None. `failure` is why calls raise all the same, None where they run.
    """

    dtypes: list[str]
    backend: str | None
    description: str | None
    failure: str | None
    reasons: dict[str, str | None]


@dataclass(frozen=True)
class Device:
    """A device that PyTorch can use; dtypes whose layers fare alike share an entry."""

    device: str
    name: str
    layers: list[Layers]


@dataclass(frozen=True)
class Facts:
    """Everything that decides what runs. No host names, so that it can be published in a bug report."""

    versions: dict[str, str | None]
    threads: int
    cores: int | None
    strategy: str
    workspace_bytes: int
    default_backend: str
    environment: dict[str, str]
    devices: list[Device]

    @property
    def healthy(self) -> bool:
        """Whether layers run on every device."""
        return all(layers.failure is None for device in self.devices for layers in device.layers)


def examine() -> Facts:
    """The facts about this process and machine."""
    return Facts(
        versions={
            "dual_lora_kernels": __version__,
            "Python": platform.python_version(),
            "PyTorch": str(torch.__version__),
            "Triton": _triton_version(),
        },
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        strategy=strategy(),
        workspace_bytes=workspace_bytes(),
        default_backend=default_backend(),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        devices=[Device(device, name, _layers(torch.device(device))) for device, name in _devices()],
    )


def render(facts: Facts) -> str:
    """The facts in words, for a terminal."""
    about = [f"{name} {version or 'missing'}" for name, version in facts.versions.items()]
    settings = [
        f"threads {facts.threads} on {facts.cores} logical cores",
        f"strategy {facts.strategy}",
        f"workspace {facts.workspace_bytes / 2**20:g} MiB",
    ]
    if facts.default_backend != "auto":
        settings.append(f"default backend {facts.default_backend} (below is what 'auto' would run)")
    lines = [", ".join(about), ", ".join(settings)]
    lines += [f"{name}={value}" for name, value in facts.environment.items()]
    for device in facts.devices:
        lines += ["", f"{device.device}: {device.name}"]
        for layers in device.layers:
            outcome = f"cannot run: {layers.failure}"
            if layers.failure is None:
                outcome = f"run on '{layers.backend}': {layers.description}"
            lines.append(f"  {', '.join(layers.dtypes)} layers {outcome}")
            for name, reason in layers.reasons.items():
                standing = "chosen" if name == layers.backend else "stands by" if reason is None else f"no, {reason}"
                lines.append(f"    {name}: {standing}")
    return "\n".join(lines)


def without_folders(text: str) -> str:
    """`text` with the folders of absolute paths left out: they name users, and the text may be published."""
    return _FOLDERS.sub("…/", text)


def in_words(error: Exception) -> str:
    """An exception's type and the first line of its message, without folders."""
    return f"{type(error).__name__}: {without_folders(str(error).strip().partition(chr(10))[0])}"


def processor() -> str:
    """The processor's name; on Linux from /proc, since `platform` knows only the architecture there."""
    if _CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _devices() -> Iterator[tuple[str, str]]:
    """What `torch.device` accepts for every device that PyTorch can use here, and its name."""
    yield "cpu", processor()
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            for index in range(module.device_count()):
                try:
                    name = module.get_device_name(index)
                except Exception as error:  # a driver that fails, say
                    name = in_words(error)
                yield f"{kind}:{index}", name
    if torch.backends.mps.is_available():
        yield "mps", processor()


def _layers(device: torch.device) -> list[Layers]:
    alike: dict[tuple[tuple[Backend, str | None], ...], list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for dtype, (compute_dtype, factor_dtype) in _LAYERS.items():
        if dtype == "fp64" and device.type == "mps":
            continue  # PyTorch has no such tensors there
        try:
            outcome = tuple(candidates("auto", device, compute_dtype, factor_dtype))
        except Exception as error:  # a driver that fails, say
            unknown.setdefault(in_words(error), []).append(dtype)
        else:
            alike.setdefault(outcome, []).append(dtype)
    known = [_outcome(dtypes, dict(outcome)) for outcome, dtypes in alike.items()]
    return known + [Layers(dtypes, None, None, failure, {}) for failure, dtypes in unknown.items()]


def _outcome(dtypes: list[str], reasons: dict[Backend, str | None]) -> Layers:
    chosen = next((backend for backend, reason in reasons.items() if reason is None), None)
    description, failure = None, None
    if chosen is None:
        failure = "no backend serves them"
    else:
        try:
            description = chosen.description()
        except RuntimeError as error:  # as its kernels would: DUAL_LORA_CPU_CAPABILITY asks for some that are not there
            failure = f"'{chosen.name}': {error}"
    return Layers(
        dtypes=dtypes,
        backend=None if chosen is None else chosen.name,
        description=description,
        failure=failure,
        reasons={backend.name: reason and without_folders(reason) for backend, reason in reasons.items()},
    )


def _triton_version() -> str | None:
    try:
        import triton
    except Exception:  # its backend has the reason
        return None
    return str(triton.__version__)
