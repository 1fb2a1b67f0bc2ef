"""``python -m benchmarks gpu``: everything worth knowing of a GPU, NVIDIA's or AMD's, within minutes."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from rich.console import Console

from dual_lora_kernels import set_default_backend
from dual_lora_kernels.backends.triton.architecture import architecture

from ..gpu import document, session_summary
from ..gpu.session import FOLDER, TINY, Session, Sizes, hold
from ..harness.environment import environment
from ..harness.results import MACHINES, Case, Results
from . import model

HELP = "A GPU within minutes: numerical suite, kernels against their rooflines, layers, decoding, memory, whole models."
MINUTES, QUICK_MINUTES = 8.0, 2.0
NOTES = (
    "mode: plain launches from Python; a replayed CUDA (HIP) graph, so that only the device's time counts; or modules "
    "under torch.compile. Few tokens run over as many layers in turn as no cache holds; a time is one layer's.",
    "Ratios are to the three products (a layer's step), to F.linear on W0 (decoding), and to the same model whose "
    "adapted layers cost three products each (a model's step), within a round.",
)


def add(parser: argparse.ArgumentParser) -> None:
    """The preset's options."""
    parser.set_defaults(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument(
        "--minutes", type=_minutes, help=f"time budget ({MINUTES:g}; with --quick {QUICK_MINUTES:g}, parts cut short)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="walk through it on a CPU in Triton's interpreter; needs --out or --quick"
    )


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return value


def run(options: argparse.Namespace, console: Console) -> Results | None:
    """Hold the session; ``summary.json``, ``summary.md`` and plots go into ``session`` beside the document.

    Raises:
        ValueError: there is no GPU, or with ``--tiny`` no interpreter, or times that mean nothing would be published.
    """
    device = _device(options)
    about = environment(device)
    root = options.out or (None if options.quick else MACHINES)
    folder = None if root is None else root / Results("gpu", "", about, ()).machine / FOLDER
    if options.tiny:
        set_default_backend("triton")  # "auto" leaves the interpreter to tests
    torch.manual_seed(0)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    held = hold(device, TINY if options.tiny else Sizes(), minutes, options.rounds, folder, console)
    _say_goals(held, console)
    failed = {key: record["reason"] for key, record in held.records.items() if record["status"] == "failed"}
    options.failed = "; ".join(f"{key}: {reason}" for key, reason in failed.items())
    cells = held.records["layers"]["results"].get("cells", [])
    cases = (*document.layer_cases(cells), *held.models)
    if not cases:
        console.print("no layer and no model was measured, so there is no document of them")
        return None
    return Results("gpu", "", about, cases, notes=(*_remarks(held), *NOTES))


def _device(options: argparse.Namespace) -> torch.device:
    if options.tiny:
        if isinstance(missing := architecture(torch.device("cpu")), str):
            raise ValueError(f"--tiny: {missing}")
        if options.out is None and not options.quick:
            raise ValueError("--tiny: its times mean nothing, so it needs a folder for them (--out), or --quick")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("no GPU: the session needs one (--tiny walks through it in Triton's interpreter)")
    return torch.device("cuda", torch.cuda.current_device())


def _say_goals(held: Session, console: Console) -> None:
    goals = session_summary.goals({} if held.sizes.interpreted else held.records)
    for name, bound, worst, _, verdict in session_summary.goal_cells(goals):
        console.print(f"{verdict}: {name} {worst} ({bound})", soft_wrap=True, markup=False)


def _remarks(held: Session) -> list[str]:
    """What of the session is not whole."""
    stopped = [f"stopped by {held.guard.told}."] if held.guard.told else []
    parts = {key: record for key, record in held.records.items() if record["status"] != "complete"}
    return [*stopped, *(f"{key}: {record['status']}, {record['reason']}." for key, record in parts.items())]


def table(case: Case) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and cells of one case."""
    if case.settings["kind"] == "train":
        return model.table(case)
    about: Any = case.settings
    title = (
        f"{about['kind']}, {about['mode']}, {about['out_features']}x{about['in_features']}, {about['tokens']} tokens, "
        f"{about['dtype']}"
    )
    headings = ["method", "median µs", f"× {document.LABELS[case.reference]}"]
    cells = [
        [document.LABELS[name], f"{case.seconds(name).median * 1e6:,.1f}", f"{case.ratio(name).median:.2f}"]
        for name in case.timed()
    ]
    return title, headings, cells
