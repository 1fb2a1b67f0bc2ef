"""Everything worth knowing of a GPU, NVIDIA's or AMD's, within a time budget: the preset ``gpu``.

Parts: the machine and its two ceilings; the numerical suite; every kernel against its roofline; memory of a training
step; a layer's step and decoding against the products that no method can avoid, PEFT's methods and naive Dual LoRA;
whole models. The last two take cases in the order of their value until their time is up. ``summary.json``,
``summary.md`` and the plots are written after every part, and also when SIGINT or SIGTERM ends the session.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dual_lora_kernels.backends import resolve_backend
from dual_lora_kernels.backends.triton.architecture import architecture
from dual_lora_kernels.runtime_settings import default_backend
from dual_lora_kernels.tuning.budget import Deadline, Guard, Stopped, part_seconds
from dual_lora_kernels.tuning.kernel_calls import RANK

from ..harness import report
from ..harness.environment import environment
from ..harness.results import Case
from ..layers import layer_cells
from ..layers.layer_step import FLOOR, step
from ..layers.memory import peak_temporary_bytes
from ..layers.methods import build, frozen_linear
from ..model import chips, predict
from ..models.case import ModelCase
from . import numerical_suite, rooflines, session_summary, whole_models
from .numerical_suite import without_paths
from .rooflines import Ceilings

FOLDER = "session"
"""Of the session's own files, in the machine's: only documents of the suite lie in that itself."""
STEM = "summary"
_SUMMARY_SECONDS = 15.0
"""Kept for the plots and the last summary."""
_MOST_WORKERS = 16
"""Processes of the numerical suite. Compiling keeps them busy; each takes about half a GiB of the GPU's memory."""
MEMORY_METHODS = ("dual_lora", "lora", "dora", "naive")


@dataclass(frozen=True)
class Sizes:
    """What is measured: layers [N, K] of the kernels, cells, tokens M."""

    layers: tuple[tuple[int, int], ...] = layer_cells.LLAMA_8B
    cells: tuple[layer_cells.Cell, ...] = tuple(layer_cells.cells())
    product_tokens: tuple[int, ...] = (1, 16, 64, 256, 4096)
    token_product_tokens: tuple[int, ...] = (256, 2048)
    memory: tuple[int, int, int] = (14336, 4096, 4096)
    models: tuple[ModelCase, ...] = tuple(whole_models.cases())
    copied_bytes: int = 2**30
    product_size: int = 8192
    tests: tuple[str, ...] = ("tests/test_triton.py", "tests/test_panels.py", "tests", "-m", "gpu")
    """What a GPU alone can say comes first: the suite compiles hundreds of kernels, 0.7 s each."""
    examples: int = 8
    """Of each property, a fifth of what CPUs try."""
    interpreted: bool = False


TINY = Sizes(
    layers=((32, 48),),
    cells=tuple(layer_cells.Cell(kind, mode, 32, 48, 3) for mode in layer_cells.MODES for kind in ("step", "decode")),
    product_tokens=(1,),
    token_product_tokens=(3,),
    memory=(32, 48, 3),
    models=tuple(whole_models.tiny()),
    copied_bytes=2**20,
    product_size=128,
    tests=("tests/test_rounding.py",),
    interpreted=True,
)
"""For a CPU and Triton's interpreter."""


@dataclass
class Session:
    """One run. `records` is what the summary is made of; there is none without a `folder`."""

    device: torch.device
    sizes: Sizes
    rounds: int
    folder: Path | None
    console: Console
    guard: Guard
    seconds: float
    end: Deadline
    progress: Progress
    task: TaskID
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: list[Case] = field(default_factory=list)
    ceilings: Ceilings | None = None

    def is_over(self, deadline: Deadline) -> bool:
        """Whether a part with this deadline is to begin nothing more."""
        return deadline.passed or self.guard.told is not None

    def show(self, what: str) -> None:
        """`what` runs now."""
        self.progress.update(self.task, description=what, completed=self.seconds - self.end.left())


Run = Callable[[Session, dict[str, Any], Deadline], None]
"""A part: it fills the dictionary as it goes, so that what it has survives its end, and looks at the deadline."""


@dataclass(frozen=True)
class Part:
    """`seconds`: what it usually needs, of eight minutes."""

    key: str
    title: str
    seconds: float
    run: Run


def _environment(session: Session, results: dict[str, Any], deadline: Deadline) -> None:
    results["environment"] = environment(session.device)
    chosen = resolve_backend(default_backend(), session.device, torch.bfloat16, torch.float32)
    chip = architecture(session.device)
    results["backend"] = f"{chosen.name} ({chip if isinstance(chip, str) else f'tile shapes of {chip.family}'})"
    session.console.print(f"backend: {results['backend']}")
    session.show("ceilings")
    session.ceilings = rooflines.ceilings(session.device, session.sizes.copied_bytes, session.sizes.product_size)
    results.update(dataclasses.asdict(session.ceilings))


def _numerics(session: Session, results: dict[str, Any], deadline: Deadline) -> None:
    if session.device.type == "cuda":
        torch.cuda.empty_cache()  # the suite's process wants memory of its own
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plain["DUAL_LORA_EXAMPLES"] = str(session.sizes.examples)
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    seconds = deadline.left() - numerical_suite.GRACE
    numerical_suite.run(results, session.sizes.tests, seconds, plain, workers)
    if workers > 1 and "-n" not in results["command"].split():
        session.console.print("pytest-xdist is not installed: the numerical suite ran in one process")


def _rooflines(session: Session, results: dict[str, Any], deadline: Deadline) -> None:
    results["rows"], results["left_out"] = [], []
    if session.ceilings is None:
        raise RuntimeError("the ceilings were not measured, so there is nothing to compare with")
    sizes = session.sizes
    for point in rooflines.points(sizes.layers, sizes.product_tokens, sizes.token_product_tokens):
        if session.is_over(deadline):
            results["left_out"].append(f"{point.label}: no time left")
            continue
        session.show(point.label)
        try:
            reached = rooflines.reached(point, session.ceilings, session.device)
        except Exception as error:
            results["left_out"].append(without_paths(f"{point.label}: {type(error).__name__}: {error}"))
            continue
        row = {**dataclasses.asdict(point), **dataclasses.asdict(reached)}
        results["rows"].append(row | {"label": point.label, "fraction": reached.fraction})


def _memory(session: Session, results: dict[str, Any], deadline: Deadline) -> None:
    rows, columns, tokens = session.sizes.memory
    results.update(layer=f"{rows}x{columns}, M={tokens}, bf16", rows=[], left_out=[])
    linear = frozen_linear(columns, rows, torch.bfloat16, session.device)
    x = torch.randn(tokens, columns, device=session.device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(tokens, rows, device=session.device, dtype=torch.bfloat16)
    for method in MEMORY_METHODS:
        if session.is_over(deadline):
            results["left_out"].append(f"{method}: no time left")
            continue
        session.show(f"memory of {method}")
        try:
            run = step(build(method, linear, RANK, RANK), x, grad)
            run()
            trace = peak_temporary_bytes(run, session.device)
            counter = _counted_peak(run, session.device)
        except Exception as error:
            results["left_out"].append(without_paths(f"{method}: {type(error).__name__}: {error}"))
            continue
        results["rows"].append({"method": method, **dataclasses.asdict(trace), "counter": counter})


def _counted_peak(run: Callable[[], object], device: torch.device) -> int | None:
    """The same peak by the allocator's own counter, to check the replayed history against; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _layers(session: Session, results: dict[str, Any], deadline: Deadline) -> None:
    cells = session.sizes.cells
    results.update(cells=[], left_out=[], unmeasured=len(cells))
    reasons = {
        "graph": "CUDA graphs need a GPU",
        "compiled": "torch.compile on a CPU builds C++ and says nothing of a GPU",
    }
    if session.sizes.interpreted:
        results["left_out"] = [f"{mode} launches: {reason}" for mode, reason in reasons.items()]
        cells = tuple(cell for cell in cells if cell.mode not in reasons)
    for cell in cells:
        if session.is_over(deadline):
            break
        session.show(cell.label)
        try:
            found = layer_cells.measure(cell, session.device, session.rounds)
            found["predicted_microseconds"] = _predicted(cell, session)
        except Exception as error:
            results["left_out"].append(without_paths(f"{cell.label}: {type(error).__name__}: {error}"))
            continue
        found["left_out"] = {name: without_paths(reason) for name, reason in found["left_out"].items()}
        results["cells"].append(found)
        results["unmeasured"] -= 1


def _models(session: Session, results: dict[str, Any], deadline: Deadline) -> None:
    results.update(cases=[], left_out=[])
    for case in session.sizes.models:
        if session.is_over(deadline):
            results["left_out"].append(f"{case.title}: no time left")
            continue
        session.show(case.title)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()  # what fits is decided by what the device has left
        try:
            found = whole_models.measure(
                case, str(session.device), session.rounds, memory=not session.sizes.interpreted
            )
        except Exception as error:
            results["left_out"].append(without_paths(f"{case.title}: {type(error).__name__}: {error}"))
            continue
        session.models.append(found)
        results["cases"].append(dataclasses.asdict(found))


def _predicted(cell: layer_cells.Cell, session: Session) -> dict[str, float] | None:
    """What the model expects of the device with this session's ceilings; None where there is nothing to compare."""
    chip, ceilings = architecture(session.device), session.ceilings
    if cell.mode != "graph" or ceilings is None or isinstance(chip, str):
        return None
    rates = (ceilings.operations_per_second, ceilings.bytes_per_second)
    modelled = chips.measured(chip.family, chip.compute_units, *rates)
    if modelled is None:
        return None
    own, floor = predict.cell_seconds(cell.kind, cell.rows, cell.columns, cell.tokens, modelled)
    return {"auto": 1e6 * own, FLOOR: 1e6 * floor}


PARTS = (
    Part("environment", "The machine", 20, _environment),
    Part("numerics", "Numerical suite", 150, _numerics),
    Part("rooflines", "Kernels against their rooflines", 50, _rooflines),
    Part("memory", "Peak memory of a training step", 15, _memory),
    Part("layers", "Layer step and decode", 110, _layers),
    Part("models", "Whole models", 115, _models),
)
"""Layers and models come last, though worth more than memory: they take whatever time is left."""


def run(session: Session) -> None:
    """All parts, each within its share of what is left, and the summary after each."""
    for part in PARTS:
        session.records[part.key] = {"status": "not run", "reason": None, "seconds": 0.0, "results": {}}
    for index, part in enumerate(PARTS):
        record = session.records[part.key]
        share = part_seconds(session.end.left() - _SUMMARY_SECONDS, [later.seconds for later in PARTS[index:]])
        if session.guard.told or not share:
            record["reason"] = f"stopped by {session.guard.told}" if session.guard.told else "the session's time was up"
            continue
        session.show(part.title)
        _run_part(session, part, record, share)
        session.console.print(f"{part.title}: {record['status']}, {record['seconds']:.0f} s")
        write(session)
    write(session)  # with the reasons of the parts that did not run


def _run_part(session: Session, part: Part, record: dict[str, Any], share: float) -> None:
    started = time.monotonic()
    record["status"] = "stopped"
    try:
        with session.guard.part(share):
            part.run(session, record["results"], Deadline.after(share))
        record["status"] = "complete"
    except Stopped as stop:
        record["reason"] = str(stop)
    except Exception as error:
        record["status"], record["reason"] = "failed", without_paths(f"{type(error).__name__}: {error}")
    record["seconds"] = round(time.monotonic() - started, 1)


def write(session: Session) -> None:
    """The summary of what there is; before the plots as well, so that nothing in them can cost the numbers."""
    records = session.records
    folder = session.folder
    if folder is None:
        return
    titles = {part.key: part.title for part in PARTS}
    name = "GPU session" + (" (interpreter; times mean nothing)" if session.sizes.interpreted else "")
    goals = session_summary.goals({} if session.sizes.interpreted else records)
    document = {
        "stopped_by": session.guard.told,
        "interpreted": session.sizes.interpreted,
        "goals": goals,
        "parts": records,
    }

    def save(plots: Sequence[str]) -> None:
        paragraphs = session_summary.paragraphs(name, goals, records, titles, plots)
        report.write(folder, STEM, document, paragraphs)

    save([])
    save(session_summary.draw(records, folder))


def hold(
    device: torch.device, sizes: Sizes, minutes: float, rounds: int, folder: Path | None, console: Console
) -> Session:
    """A whole session, as far as `minutes` and signals let it come."""
    seconds = 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Guard() as guard, Progress(*columns, console=console, transient=True) as progress:
        session = Session(
            device=device,
            sizes=sizes,
            rounds=rounds,
            folder=folder,
            console=console,
            guard=guard,
            seconds=seconds,
            end=Deadline.after(seconds),
            progress=progress,
            task=progress.add_task("session", total=seconds),
        )
        run(session)
    return session
