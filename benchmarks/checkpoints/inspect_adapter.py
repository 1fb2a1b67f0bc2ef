"""Inspecting an adapter of a gigabyte beside its base: time, speed and the process's own memory.

    python -m benchmarks.checkpoints.inspect_adapter --folder FOLDER

A Llama 3 8B's 224 linear layers with r1 = r2 = 48 have 1.0 GB of fp32 factors, and 7.0 G entries of ΔW. The adapter is
drawn as trained ones are sized, the base is a bf16 checkpoint of a file a layer; both are made in a folder of their own
in FOLDER, 15 GB, and removed. The inspection runs in a process of its own, whose peak is the kernel's count of its
resident memory. Ranks are computed as well for the first ``--spectra`` layers of the model alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dual_lora_kernels.inspection.inspect_adapter import inspect_adapter
from dual_lora_kernels.inspection.report import AdapterReport

from ..harness import report
from ..harness.environment import environment, sentence
from ..harness.resident_memory import resident_growth
from .synthetic import make_adapter, make_base

STEM = "cpu_inspect_adapter"
HEADINGS = (
    "inspection", "layers", "adapter, MB", "base, MB", "seconds", "MB/s", "processor seconds",
    "processor ns / entry of ΔW", "peak above start, MB",
)  # fmt: skip
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Result:
    """One inspection: what it read, and what it took. The processor's seconds do not count what others were given."""

    inspection: str
    layers: int
    adapter_bytes: int
    base_bytes: int
    entries: int
    seconds: float
    processor_seconds: float
    above: int | None

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        read = self.adapter_bytes + self.base_bytes
        return (
            self.inspection,
            f"{self.layers}",
            f"{self.adapter_bytes / _MEGABYTE:,.0f}",
            f"{self.base_bytes / _MEGABYTE:,.0f}",
            f"{self.seconds:,.0f}",
            f"{read / _MEGABYTE / self.seconds:,.1f}",
            f"{self.processor_seconds:,.0f}",
            f"{self.processor_seconds * 1e9 / self.entries:,.0f}",
            "" if self.above is None else f"{self.above / _MEGABYTE:,.0f}",
        )


def measure(inspection: str, adapter: Path, base: Path | None, spectra: bool) -> Result:
    """Inspect in this process."""
    reports: list[AdapterReport] = []
    started, used = time.perf_counter(), time.process_time()
    above = resident_growth(lambda: reports.append(inspect_adapter(adapter, base, spectra=spectra)))
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - used
    return Result(
        inspection=inspection,
        layers=len(reports[0].layers),
        adapter_bytes=reports[0].adapter_bytes,
        base_bytes=0 if base is None else sum(file.stat().st_size for file in base.glob("*.safetensors")),
        entries=sum(math.prod(layer.shape) for layer in reports[0].layers),
        seconds=seconds,
        processor_seconds=processor_seconds,
        above=above,
    )


def run(folder: Path, depth: int, rank: int, spectra: int) -> Iterator[Result]:
    """The measurements, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="inspect-adapter-") as name:
        here = Path(name)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
            processes.submit(make_adapter, here / "adapter", depth, rank).result()
            make_base(here / "base", depth)
            cases = [("alone, no spectra", "adapter", None, False), ("with base, no spectra", "adapter", "base", False)]
            if spectra:
                processes.submit(make_adapter, here / "first", spectra, rank).result()
                cases.append(("alone, spectra", "first", None, True))
            for inspection, adapter, base, with_spectra in cases:
                base_folder = None if base is None else here / base
                yield processes.submit(measure, inspection, here / adapter, base_folder, with_spectra).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints.inspect_adapter", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to make adapter and base: 15 GB")
    parser.add_argument("--depth", type=int, default=32, help="the model's layers, of 7 adapted ones each (32)")
    parser.add_argument("--rank", type=int, default=48, help="r1 and r2 (48)")
    parser.add_argument("--spectra", type=int, default=1, help="layers of the model to compute spectra of (1)")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    about = environment(torch.device("cpu"))
    console = Console()
    results = []
    for result in run(options.folder, options.depth, options.rank, options.spectra):
        results.append(result)
        console.print(*result.cells(), sep="  ")
    cells = [result.cells() for result in results]
    title = f"Inspecting an adapter with r1 = r2 = {options.rank} of a Llama 3 8B's shapes"
    report.print_table(title, HEADINGS, cells, console)
    settings = {name: getattr(options, name) for name in ("depth", "rank", "spectra")}
    document = {"settings": settings, "environment": about, "results": [dataclasses.asdict(each) for each in results]}
    report.write(options.out, STEM, document, [f"# {title}", report.markdown_table(HEADINGS, cells), sentence(about)])


if __name__ == "__main__":
    main()
