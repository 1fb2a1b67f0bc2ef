"""A training step under FSDP2: memory of one process and time, of Dual LoRA and of PEFT LoRA on a small bf16 Llama.

    python -m benchmarks.distributed.fsdp_memory --processes 2 4

``fully_shard`` of every block and of the model, joined by gloo on one machine, one thread for each process. All linear
layers but the head are adapted, with the same number of trainable parameters, in fp32 unless a method's name says
otherwise. A step is forward, backward and AdamW on tokens of the process's own. Memory is of fresh processes for each
method, after a step of warm-up; all methods' models share the processes that are timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.distributed.fsdp import fully_shard

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, workspace_bytes
from dual_lora_kernels.sharding import local_block

from ..harness import report
from ..harness.environment import environment, load_average, sentence
from ..harness.report import MEBIBYTE
from ..harness.resident_memory import resident_growth, return_pages_at_once
from ..harness.timing import Quartiles, interleaved, quartiles, ratios
from ..layers.memory import peak_temporary_bytes
from ..layers.methods import ALPHA
from ..models.base import base_model
from ..models.case import ModelCase

STEM = "fsdp_memory"
LORA, LORA_BF16, DUAL_LORA = "lora", "lora_bf16", "dual_lora"
LABELS = {LORA: "PEFT LoRA", LORA_BF16: "PEFT LoRA, bf16 factors", DUAL_LORA: "dual_lora_kernels"}
HEADINGS = (
    "processes, method", "shards MiB", "peak MiB", "− LoRA", "resident MiB", "− LoRA", "median ms", "× LoRA",
)  # fmt: skip
WORKERS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore::FutureWarning"}
"""Variables of the measured processes; the warnings are transformers' about names that PEFT uses."""
PRELOADED = ["benchmarks.models.base", "dual_lora_kernels", "peft", "torch.distributed.fsdp"]
NOTES = (
    "shards: parameters that one process keeps, base and factors. peak: most bytes alive at once that PyTorch's "
    "allocator handed out in a step, above what was there before it; the gathered blocks are among them. resident: "
    "how far the process's resident size rises in a step, which also sees what other allocators take, gloo's among "
    "them. All are of the process that has most.",
    "PEFT LoRA with fp32 factors keeps an fp32 copy of every adapted layer's input for backward; with bf16 factors "
    "(autocast_adapter_dtype=False) it keeps the inputs in bf16, as Dual LoRA does with fp32 factors.",
    "× LoRA: the median over rounds of the ratio within a round; a round ends when all processes have ended.",
)


@dataclass(frozen=True)
class Layout:
    """How the model is spread and run."""

    processes: int
    checkpointing: bool

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.processes}{', checkpointed' if self.checkpointing else ''}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `resident` is None where the system does not tell."""

    shards: int
    trainable: int
    """Numbers, not bytes, of the whole model."""
    peak: int
    largest: int
    resident: int | None


@dataclass(frozen=True)
class Row:
    """One method on one layout; `memory` by process."""

    layout: Layout
    method: str
    memory: list[Memory]
    milliseconds: Quartiles
    to_lora: Quartiles

    def most(self, name: str) -> int | None:
        """The field's largest value over the processes."""
        values = [getattr(each, name) for each in self.memory]
        return None if None in values else max(values)


def sharded(case: ModelCase, method: str, checkpointing: bool) -> nn.Module:
    """The adapted model, adapted first and then sharded, in training mode."""
    base = base_model(case)
    blocks: Any = base.model.layers
    model: nn.Module = base
    if method == DUAL_LORA:
        model = apply_dual_lora(base, DualLoraConfig(r1=case.rank, r2=case.rank, alpha=ALPHA))
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2 * case.rank, lora_alpha=ALPHA, target_modules="all-linear")
        model = get_peft_model(base, config, autocast_adapter_dtype=method != LORA_BF16)
    if checkpointing:  # after get_peft_model, which would make the embeddings' output require a gradient
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model.train()


def training_step(model: nn.Module, case: ModelCase) -> Callable[[], None]:
    """Forward, backward, AdamW, zeroing; ends when all processes have ended."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(case.shape.vocabulary, (case.batch, case.sequence), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()

    return step


def measure_memory(case: ModelCase, method: str, checkpointing: bool) -> dict[str, Any]:
    """One process's part: its `Memory`, as a dictionary."""
    return_pages_at_once()
    model = sharded(case, method, checkpointing)
    step = training_step(model, case)
    step()  # makes the optimiser's state and FSDP's
    resident = resident_growth(step)
    trace = peak_temporary_bytes(step)
    parameters = list(model.parameters())
    shards = sum(local.numel() * local.itemsize for local, _ in map(local_block, parameters))
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return dataclasses.asdict(Memory(shards, trainable, trace.peak, trace.largest, resident))


def measure_time(case: ModelCase, rounds: int, checkpointing: bool) -> dict[str, list[float]]:
    """One process's part: seconds of each round by method."""
    steps: dict[str, Callable[[], object]] = {
        method: training_step(sharded(case, method, checkpointing), case) for method in LABELS
    }
    return interleaved(steps, rounds=rounds, warmup=1, device=torch.device("cpu"), show=False)


def in_processes(count: int, part: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``part(*args)``, a function of this module, returns in each of `count` fresh processes joined by gloo."""
    with tempfile.TemporaryDirectory(prefix="fsdp-") as folder:
        # Forked from a server that has imported what takes ten seconds to import, and has done nothing else.
        multiprocessing.set_forkserver_preload(PRELOADED)
        start = multiprocessing.start_processes  # type: ignore[attr-defined]
        start(_work, (count, folder, part, args), count, start_method="forkserver")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def _work(rank: int, count: int, folder: str, part: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("dual_lora_kernels").setLevel("WARNING")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    result = part(*args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    case: ModelCase, layouts: Sequence[Layout], rounds: int, console: Console | None = None
) -> Iterator[list[Row]]:
    """Every method, layout by layout."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(layouts) * (len(LABELS) + 1))

        def run(what: str, layout: Layout, part: Callable[..., Any], *args: Any) -> list[Any]:
            progress.update(task, description=f"{layout.label}: {what}")
            results = in_processes(layout.processes, part, *args, layout.checkpointing)
            progress.advance(task)
            return results

        for layout in layouts:
            memory = {
                method: [Memory(**each) for each in run(LABELS[method], layout, measure_memory, case, method)]
                for method in LABELS
            }
            seconds = run("time", layout, measure_time, case, rounds)[0]
            times = {method: quartiles([value * 1e3 for value in own]) for method, own in seconds.items()}
            yield [
                Row(layout, method, own, times[method], ratios(seconds, method, LORA)) for method, own in memory.items()
            ]


def cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    lora = {row.layout: row for row in rows if row.method == LORA}
    for row in rows:
        memory = []
        for name in ("peak", "resident"):
            own, reference = row.most(name), lora[row.layout].most(name)
            if own is None or reference is None:
                memory += ["–", "–"]
            else:
                memory += [f"{own / MEBIBYTE:,.1f}", f"{(own - reference) / MEBIBYTE:+,.1f}"]
        yield (
            f"{row.layout.label}, {LABELS[row.method]}", f"{(row.most('shards') or 0) / MEBIBYTE:,.1f}", *memory,
            f"{row.milliseconds.median:,.0f}", f"{row.to_lora.median:.2f}",
        )  # fmt: skip


def write(folder: Path, case: ModelCase, rounds: int, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """The JSON and the Markdown of what has been measured so far."""
    title = f"FSDP2: {case.title}".replace("tokens", "tokens a process")
    load = load_average()
    document: dict[str, Any] = {
        "settings": dataclasses.asdict(case), "workspace_bytes": workspace_bytes(), "environment": about,
        "load_average_after": load, "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    notes = (*NOTES, f"The workspace, by which Dual LoRA may exceed LoRA: {workspace_bytes() / MEBIBYTE:g} MiB.")
    about_run = f"{rounds} rounds after one of warm-up; load average {load} at the end; {sentence(about)}"
    table = report.markdown_table(HEADINGS, list(cells(rows)))
    report.write(folder, STEM, document, [f"# {title}", table, "\n".join(f"- {note}" for note in notes), about_run])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed.fsdp_memory", description="Memory and time of a step under FSDP2."
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes (2 4)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 64 (1024)")
    parser.add_argument("--layers", type=int, default=4, help="blocks (4)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a process (2)")
    parser.add_argument("--rank", type=int, default=8, help="r1 = r2, half of LoRA's r (8)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ |= WORKERS
    case = ModelCase(f"llama-h{options.hidden}", "bf16", options.batch, options.sequence, options.layers, options.rank)
    about, console = environment(torch.device("cpu")), Console()
    layouts = [Layout(count, on) for count in options.processes for on in (False, True)]
    rows: list[Row] = []
    for done in measure(case, layouts, options.rounds, console):
        rows += done
        write(options.out, case, options.rounds, about, rows)  # each time: what an interrupted run has measured is kept
    console.print(report.markdown_table(HEADINGS, list(cells(rows))), soft_wrap=True, markup=False, highlight=False)
    console.print(f"written to {options.out}: {STEM}.json, .md")


if __name__ == "__main__":
    main()
