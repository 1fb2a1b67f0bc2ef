"""A 70B model's largest layer, 28672 × 8192 in NF4, trained for a few steps, and the process's own memory.

    python -m benchmarks.quantised.large_layer --tokens 512 --steps 10

Llama 3 70B's ``gate_proj`` and ``up_proj`` have 235 million numbers each, 470 MB in bf16. Neither W0 nor ΔW is ever
whole. The peak is the kernel's own count of the process's resident memory (VmHWM), set back before the first step and
compared with what was resident then: the interpreter, the packed weight, the adapter and the inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels import DualLoraLinear, DualLoraWarmup

from ..harness import report
from ..harness.environment import DTYPE_NAMES, environment, sentence
from .bases import nf4_linear

STEM = "cpu_nf4_large_layer"
HEADINGS = ("quantity", "value")
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Result:
    """Bytes, seconds of each step, and the losses before the first and after the last step."""

    packed: int
    dense_bf16: int
    above: int
    seconds: list[float]
    first_loss: float
    last_loss: float


def _status(field: str) -> int:
    """Bytes of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measure(shape: tuple[int, int], tokens: int, steps: int, dtype: torch.dtype, rank: int) -> Result:
    """Train an adapter on the layer towards random outputs."""
    torch.manual_seed(0)
    base = nf4_linear(*shape, dtype, show=True)
    layer = DualLoraLinear.from_linear(base, r1=rank, r2=rank)
    x = torch.randn(tokens, shape[1], dtype=dtype)
    target = torch.randn(tokens, shape[0], dtype=dtype)
    optimizer = torch.optim.AdamW(layer.factors(), lr=1e-3)
    warmup = DualLoraWarmup(layer, steps)
    losses, seconds = [], []
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _status("VmRSS")
    for _ in track(range(steps), "training"):
        started = time.perf_counter()
        loss = torch.nn.functional.mse_loss(layer(x).float(), target.float())
        loss.backward()
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    above = _status("VmHWM") - before
    state = base.weight.quant_state
    tensors = (base.weight.data, state.absmax, state.state2.absmax)
    packed = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return Result(packed, 2 * shape[0] * shape[1], above, seconds, losses[0], losses[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised.large_layer", description=__doc__)
    parser.add_argument("--shape", default="28672x8192", help="OUTxIN")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    out_features, in_features = map(int, options.shape.split("x"))
    result = measure(
        (out_features, in_features), options.tokens, options.steps, DTYPE_NAMES[options.dtype], options.rank
    )
    title = f"{options.steps} steps of a {options.shape} NF4 layer, {options.dtype}, {options.tokens} tokens"
    cells = [
        ("packed weight with its statistics, MB", f"{result.packed / _MEGABYTE:,.0f}"),
        ("the same weight in bf16, MB", f"{result.dense_bf16 / _MEGABYTE:,.0f}"),
        ("peak resident memory above the start, MB", f"{result.above / _MEGABYTE:,.0f}"),
        ("median seconds a step", f"{statistics.median(result.seconds):.2f}"),
        ("loss at the first and the last step", f"{result.first_loss:.4f}, {result.last_loss:.4f}"),
    ]
    report.print_table(title, HEADINGS, cells, Console())
    about = environment(torch.device("cpu"))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    document = {"settings": settings, "environment": about, "result": dataclasses.asdict(result)}
    report.write(options.out, STEM, document, [f"# {title}", report.markdown_table(HEADINGS, cells), sentence(about)])


if __name__ == "__main__":
    main()
