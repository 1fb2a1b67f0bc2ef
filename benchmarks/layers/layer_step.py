"""One layer's training step, every method against the matrix products that no method can avoid.

    python -m benchmarks.layers.layer_step --shape 4096x4096 --tokens 512 --dtype fp32 --threads 2

A step is a forward and a backward pass that returns the input's and the adapter's gradients. The floor is X W0ᵀ, G W0
and Gᵀ X by the vendor's library in the same dtype, the last into a tensor made beforehand, since no method has to
return it. X [M, K], G [M, N], W0 [N, K].
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..harness import charts, report
from ..harness.environment import DTYPE_NAMES, device_kind, environment, load_average, sentence
from ..harness.timing import Quartiles, Seconds, interleaved, quartiles, ratios
from .memory import peak_temporary_bytes
from .methods import LABELS, METHODS, build, frozen_linear, trainable_parameters

MEBIBYTE = 2**20
FLOOR = "floor"
HEADINGS = ("method", "median ms", "× floor", "× naive", "temporary MiB", "trainable")
NOTES = (
    "Step: forward, then backward to the input and the adapter. Each round runs every method once, the first one "
    "rotating; a ratio is the median over rounds of the ratio within a round, since the machine is shared. "
    "Quartiles are in the JSON and the chart.",
    "Three products (the floor): X W0ᵀ, G W0, Gᵀ X. PEFT LoRA stays under it, as it never needs Gᵀ X.",
    "Temporary MiB: the largest sum of memory that the step held at one moment and released again, such as saved "
    "activations, workspace and intermediates. It does not count what the step returns (the output and the gradients) "
    "or what existed before (W0, X and G). It comes from PyTorch's allocator, in a pass of its own, so buffers of the "
    "BLAS library are not in it.",
)


@dataclass(frozen=True)
class Settings:
    """What is measured. `tokens` is M, `rank` is r1 = r2."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str
    rank: int
    rounds: int
    warmup: int
    methods: tuple[str, ...]
    device: str

    @property
    def stem(self) -> str:
        """The results' file name without its suffix."""
        shape = f"{self.out_features}x{self.in_features}"
        return f"{device_kind(torch.device(self.device))}_layer_step_{self.dtype}_{shape}_m{self.tokens}"


@dataclass(frozen=True)
class Row:
    """One method's measurements. `to_naive` is None unless naive ran too, `temporary_bytes` is None for the floor."""

    method: str
    milliseconds: Quartiles
    to_floor: Quartiles
    to_naive: Quartiles | None
    temporary_bytes: int | None
    trainable: int


def step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward of `module`: its output, the input's gradient and the adapter's gradients.

    The gradients are returned rather than kept on the parameters: they are gone before the next method runs.
    """
    parameters = trainable_parameters(module)

    def run() -> tuple[torch.Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, (x, *parameters), grad)

    return run


def floor_step(
    weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """The three products. Not to be timed with gradients enabled on `x`."""
    x = x.detach()
    token_product = torch.empty_like(weight)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.linear(x, weight)
        torch.mm(grad.t(), x, out=token_product)
        return y, grad @ weight

    return run


def measure(settings: Settings, console: Console | None = None) -> tuple[list[Row], Seconds]:
    """Time and memory of every method in `settings`, and the raw times."""
    device, dtype = torch.device(settings.device), DTYPE_NAMES[settings.dtype]
    torch.manual_seed(0)
    linear = frozen_linear(settings.in_features, settings.out_features, dtype, device)
    x = torch.randn(settings.tokens, settings.in_features, dtype=dtype, device=device).requires_grad_()
    grad = torch.randn(settings.tokens, settings.out_features, dtype=dtype, device=device)
    modules = {name: build(name, linear, settings.rank, settings.rank) for name in settings.methods}
    candidates: dict[str, Callable[[], object]] = {
        FLOOR: floor_step(linear.weight, x, grad),
        **{name: step(module, x, grad) for name, module in modules.items()},
    }
    seconds = interleaved(candidates, rounds=settings.rounds, warmup=settings.warmup, device=device, console=console)
    rows = [
        Row(
            method=name,
            milliseconds=quartiles([value * 1e3 for value in seconds[name]]),
            to_floor=ratios(seconds, name, FLOOR),
            to_naive=ratios(seconds, name, "naive") if "naive" in seconds else None,
            temporary_bytes=peak_temporary_bytes(function, device).peak_temporary if name in modules else None,
            trainable=sum(p.numel() for p in trainable_parameters(modules[name])) if name in modules else 0,
        )
        for name, function in candidates.items()
    ]
    return rows, seconds


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (
            LABELS[row.method],
            f"{row.milliseconds.median:,.1f}",
            f"{row.to_floor.median:.2f}",
            "–" if row.to_naive is None else f"{row.to_naive.median:.2f}",
            "–" if row.temporary_bytes is None else f"{row.temporary_bytes / MEBIBYTE:,.1f}",
            f"{row.trainable:,}" if row.trainable else "–",
        )
        for row in rows
    ]


def title(settings: Settings) -> str:
    """The measurement's name, for headings."""
    return (
        f"Layer step, {settings.dtype}, N={settings.out_features}, K={settings.in_features}, M={settings.tokens}, "
        f"r1=r2={settings.rank}"
    )


def run(settings: Settings, folder: Path, console: Console) -> list[Row]:
    """Measure, print, and write the JSON, the Markdown and the chart into `folder`."""
    about = environment(torch.device(settings.device))
    rows, seconds = measure(settings, console)
    load_after = load_average()
    report.print_table(title(settings), HEADINGS, cells(rows), console)
    document: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "environment": about,
        "load_average_after": load_after,
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": seconds,
    }
    paragraphs = [
        f"# {title(settings)}",
        report.markdown_table(HEADINGS, cells(rows)),
        f"![Step time over the floor]({settings.stem}.png)",
        "\n".join(f"- {note}" for note in NOTES),
        f"{settings.rounds} rounds after {settings.warmup} of warm-up; load average {load_after} at the end, with this "
        f"benchmark's own {about['threads']} threads; {sentence(about)}",
    ]
    report.write(folder, settings.stem, document, paragraphs)
    bars = {LABELS[row.method]: row.to_floor for row in rows if row.method != FLOOR}
    axis = "step time / three products (median, quartiles)"
    charts.ratio_bars(bars, LABELS["dual_lora"], title(settings), axis, folder / f"{settings.stem}.png")
    return rows


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected OUTxIN such as 4096x4096")
    return int(rows), int(columns)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def _dtype(text: str) -> str:
    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPE_NAMES.items()}
    name = names.get(text, text)
    if name not in DTYPE_NAMES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(DTYPE_NAMES)}")
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers.layer_step",
        description="Time and memory of one layer's training step, per method.",
    )
    parser.add_argument("--shape", type=_shape, default=(4096, 4096), help="OUTxIN, as the weight's (4096x4096)")
    parser.add_argument("--tokens", type=_positive, default=512, help="tokens per step, M (512)")
    parser.add_argument("--dtype", type=_dtype, default="fp32", help="fp32, bf16, fp16 or fp64 (fp32)")
    parser.add_argument("--rank", type=_positive, default=16, help="r1 = r2; the others' ranks follow (16)")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--rounds", type=_positive, default=7, help="timed rounds (7)")
    parser.add_argument("--warmup", type=_positive, default=2, help="rounds before them (2)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    out_features, in_features = options.shape
    settings = Settings(
        out_features=out_features,
        in_features=in_features,
        tokens=options.tokens,
        dtype=options.dtype,
        rank=options.rank,
        rounds=options.rounds,
        warmup=options.warmup,
        methods=tuple(options.methods),
        device=options.device,
    )
    console = Console()
    run(settings, options.out, console)
    console.print(f"written to {options.out}: {settings.stem}.json, .md, .png")


if __name__ == "__main__":
    main()
