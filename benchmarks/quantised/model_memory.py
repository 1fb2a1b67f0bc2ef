"""A training step of a small Llama in NF4, every linear layer adapted: memory and time of Dual LoRA and PEFT's QLoRA.

    python -m benchmarks.quantised.model_memory --hidden 1024 --layers 4 --threads 2

All methods have the same number of trainable parameters. A step is forward, backward and AdamW. Memory is what
PyTorch's allocator handed out above what was there before the step: model, adapters, their gradients and the
optimiser's state exist by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..harness import report
from ..harness.environment import environment, load_average, sentence
from ..harness.report import MEBIBYTE
from ..harness.timing import Quartiles, interleaved, quartiles, ratios
from ..layers.memory import peak_temporary_bytes
from ..models.base import base_model, replace_linears
from ..models.case import ModelCase
from ..models.steps import batch
from .bases import LABELS, METHODS, nf4_linear

HEADINGS = ("method", "peak MiB", "largest MiB", "median ms", "× PEFT QLoRA", "trainable")


@dataclass(frozen=True)
class Row:
    """One method's measurements."""

    method: str
    peak: int
    largest: int
    milliseconds: Quartiles
    to_qlora: Quartiles
    trainable: int


def adapted(case: ModelCase, method: str) -> nn.Module:
    """The frozen model with every linear layer but the head in NF4 and adapted; checkpointing of activations off."""
    model: nn.Module = base_model(case)

    def layer(linear: nn.Linear) -> nn.Module:
        quantised = nf4_linear(linear.out_features, linear.in_features, case.torch_dtype)
        return METHODS[method](quantised, case.rank, case.rank)

    replace_linears(model, layer)
    return model.train()


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward, backward, AdamW; gradients stay allocated."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def measure(case: ModelCase, rounds: int, console: Console | None = None) -> list[Row]:
    """Every method."""
    torch.manual_seed(0)
    tokens = batch(case)
    models = {method: adapted(case, method) for method in METHODS}
    gc.collect()
    steps: dict[str, Callable[[], object]] = {name: training_step(model, tokens) for name, model in models.items()}
    seconds = interleaved(steps, rounds=rounds, warmup=1, device=torch.device("cpu"), console=console)
    rows = []
    for name, step in steps.items():
        trace = peak_temporary_bytes(step)
        trainable = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        milliseconds = quartiles([value * 1e3 for value in seconds[name]])
        rows.append(Row(name, trace.peak, trace.largest, milliseconds, ratios(seconds, name, "qlora"), trainable))
    return rows


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (
            LABELS[row.method], f"{row.peak / MEBIBYTE:,.0f}", f"{row.largest / MEBIBYTE:,.0f}",
            f"{row.milliseconds.median:,.0f}", f"{row.to_qlora.median:.2f}", f"{row.trainable:,}",
        )
        for row in rows
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised.model_memory", description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    case = ModelCase(
        f"llama-h{options.hidden}", options.dtype, options.batch, options.sequence, options.layers, options.rank
    )
    about, console = environment(torch.device("cpu")), Console()
    rows = measure(case, options.rounds, console)
    title = f"NF4: {case.title}"
    report.print_table(title, HEADINGS, cells(rows), console)
    load = load_average()
    document: dict[str, Any] = {
        "settings": dataclasses.asdict(case), "environment": about, "load_average_after": load,
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    stem = f"cpu_nf4_model_{options.dtype}_h{options.hidden}"
    about_run = f"{options.rounds} rounds after one of warm-up; load average {load} at the end; {sentence(about)}"
    report.write(options.out, stem, document, [f"# {title}", report.markdown_table(HEADINGS, cells(rows)), about_run])


if __name__ == "__main__":
    main()
