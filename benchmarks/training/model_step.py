"""A training step of a small Llama: every method on all linear layers of its blocks, at equal trainable parameters.

    python -m benchmarks.training.model_step --hidden 1024 --dtype bf16 --threads 2

A step is what transformers' Trainer does in one: forward, backward, clipping of the gradients' norm, AdamW, zeroing.
``frozen`` is the model without adapters, forward and backward to the embedded input, which no method can do without.
With ``--busy N``, N processes spin beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from ..harness import charts, report
from ..harness.environment import DTYPE_NAMES, environment, load_average, sentence
from ..harness.timing import Quartiles, interleaved, quartiles, ratios
from ..layers.methods import LABELS, build

FROZEN = "frozen"
METHODS = ("lora", "dora", "dual_lora", "naive")
HEADINGS = ("method", "median ms", "tokens/s", "× frozen", "× DoRA", "products", "kernels", "other", "Python")
VOCABULARY = 2048
NOTES = (
    "Each round runs every method once, the first one rotating; a ratio is the median over rounds of the ratio within "
    "a round. Shares are of the time that the profiler sees in operations, in a pass of its own: matrix products "
    "(aten's mm and its like), the native backend's kernels, other PyTorch operations, and autograd's engine and "
    "Python functions.",
    "frozen: the model without adapters, forward and backward to its embedded input, without an optimiser.",
)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot", "mkldnn::", "aten::linear")


@dataclass(frozen=True)
class Settings:
    """What is measured. `rank` is r1 = r2, `busy` the number of processes that spin beside it."""

    hidden: int
    layers: int
    sequence: int
    batch: int
    dtype: str
    rank: int
    rounds: int
    methods: tuple[str, ...]
    busy: int

    @property
    def stem(self) -> str:
        """The results' file name without its suffix."""
        return f"cpu_model_step_{self.dtype}_h{self.hidden}" + ("_busy" if self.busy else "")

    @property
    def title(self) -> str:
        """The measurement's name, for headings."""
        beside = f", beside {self.busy} busy processes" if self.busy else ""
        return (
            f"Training step, {self.dtype}, Llama of {self.layers} layers, hidden {self.hidden}, {self.batch} × "
            f"{self.sequence} tokens, r1=r2={self.rank}{beside}"
        )


@dataclass(frozen=True)
class Row:
    """One method's measurements; shares are of a step's time, in the order of the headings."""

    method: str
    milliseconds: Quartiles
    tokens_per_second: float
    to_frozen: Quartiles
    to_dora: Quartiles | None
    shares: dict[str, float]


def base_model(settings: Settings) -> LlamaForCausalLM:
    """A frozen Llama with random weights, the same for every method."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=settings.hidden, intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden // 64,
        num_key_value_heads=settings.hidden // 64, max_position_embeddings=settings.sequence, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DTYPE_NAMES[settings.dtype]).requires_grad_(False)


def adapted(settings: Settings, method: str) -> nn.Module:
    """The model with every linear layer but the head adapted."""
    model: nn.Module = base_model(settings)
    if method != FROZEN:
        blocks = model.get_submodule("model")
        for name, module in list(blocks.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(blocks.get_submodule(parent), last, build(method, module, settings.rank, settings.rank))
    return model.train()


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """One step on `tokens`; of a model without trainable parameters, forward and backward alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()  # type: ignore[operator]
    if not parameters:
        return lambda: torch.autograd.grad(model(inputs_embeds=embedded, labels=tokens).loss, embedded)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        embedded.grad = None

    return step


def shares(step: Callable[[], object]) -> dict[str, float]:
    """What a step's time goes to, as parts of it."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        step()
    wall = (time.perf_counter() - started) * 1e6
    events = recording.key_averages()
    span = min(wall, sum(event.self_cpu_time_total for event in events))
    products = sum(e.self_cpu_time_total for e in events if e.key.startswith(_PRODUCTS))
    kernels = sum(e.self_cpu_time_total for e in events if e.key.startswith("dual_lora_kernels::cpu"))
    wrappers = ("DualLoraFunction", "autograd::engine")
    python = sum(e.self_cpu_time_total for e in events if e.key.startswith(wrappers))
    other = span - products - kernels - python
    return {"products": products / span, "kernels": kernels / span, "other": other / span, "Python": python / span}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Within it, `count` processes spin."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(settings: Settings, console: Console | None = None) -> tuple[list[Row], dict[str, list[float]]]:
    """Time and shares of every method."""
    tokens = torch.randint(VOCABULARY, (settings.batch, settings.sequence), generator=torch.Generator().manual_seed(0))
    names = (FROZEN, *settings.methods)
    steps = {name: training_step(adapted(settings, name), tokens) for name in names}
    with busy(settings.busy):
        seconds = interleaved(steps, rounds=settings.rounds, warmup=1, device=torch.device("cpu"), console=console)
    rows = []
    for name, step in steps.items():
        times = quartiles([value * 1e3 for value in seconds[name]])
        to_dora = ratios(seconds, name, "dora") if "dora" in seconds else None
        per_second = tokens.numel() / times.median * 1e3
        rows.append(Row(name, times, per_second, ratios(seconds, name, FROZEN), to_dora, shares(step)))
    return rows, seconds


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (
            LABELS.get(row.method, row.method),
            f"{row.milliseconds.median:,.0f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.to_frozen.median:.2f}",
            "–" if row.to_dora is None else f"{row.to_dora.median:.2f}",
            *(f"{share:.0%}" for share in row.shares.values()),
        )
        for row in rows
    ]


def run(settings: Settings, folder: Path, console: Console) -> list[Row]:
    """Measure, print, and write the JSON, the Markdown and the chart into `folder`."""
    about = environment(torch.device("cpu"))
    rows, seconds = measure(settings, console)
    report.print_table(settings.title, HEADINGS, cells(rows), console)
    document: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "environment": about,
        "load_average_after": load_average(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": seconds,
    }
    paragraphs = [
        f"# {settings.title}",
        report.markdown_table(HEADINGS, cells(rows)),
        f"![Step time over the frozen model's]({settings.stem}.png)",
        "\n".join(f"- {note}" for note in NOTES),
        f"{settings.rounds} rounds after one of warm-up; {sentence(about)}",
    ]
    report.write(folder, settings.stem, document, paragraphs)
    bars = {LABELS.get(row.method, row.method): row.to_frozen for row in rows if row.method != FROZEN}
    axis = "step time / frozen model's (median, quartiles)"
    charts.ratio_bars(bars, LABELS["dual_lora"], settings.title, axis, folder / f"{settings.stem}.png")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.model_step", description="Training steps of a small Llama, per method."
    )
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 64 (1024)")
    parser.add_argument("--layers", type=int, default=8, help="blocks (8)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--dtype", choices=list(DTYPE_NAMES), default="fp32", help="of the frozen model (fp32)")
    parser.add_argument("--rank", type=int, default=16, help="r1 = r2; the others' ranks follow (16)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--busy", type=int, default=0, help="processes that spin beside it (0)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(
        hidden=options.hidden,
        layers=options.layers,
        sequence=options.sequence,
        batch=options.batch,
        dtype=options.dtype,
        rank=options.rank,
        rounds=options.rounds,
        methods=tuple(options.methods),
        busy=options.busy,
    )
    console = Console()
    run(settings, options.out, console)
    console.print(f"written to {options.out}: {settings.stem}.json, .md, .png")


if __name__ == "__main__":
    main()
