"""``python -m benchmarks merge``: merging an adapter into a layer in memory, or into a checkpoint on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from ..checkpoints import merge_checkpoint
from ..harness.environment import DTYPE_NAMES, environment
from ..harness.report import MEBIBYTE
from ..harness.results import Case, Measurement, Results, Setting
from ..harness.timing import interleaved
from ..layers.checks import Checker
from ..layers.claims import Layer
from ..layers.merging import COPY, SUBJECTS, copying, merged_weight, merging
from ..layers.methods import LABELS, build, frozen_linear
from ..layers.subjects import Subjects
from .arguments import add_device, count, shape
from .arguments import dtype as dtype_name

HELP = "Merging into one layer in memory beside copying its weight; with --on-disk FOLDER into a checkpoint beside cp."
SHAPES = ((1024, 1024), (4096, 4096), (4096, 11008))
QUICK_SHAPES = ((256, 512),)
DEPTH, QUICK_DEPTH = 10, 1
KILLS, QUICK_KILLS = 50, 2
DISK_NAME = "merge-on-disk"
NOTES = (
    "Each subject merges into a weight of its own, in every round once more. PEFT's merge without its check for NaNs; "
    "dual_lora_merge_ first checks that nothing overflows. Before that, 64 columns of the merged weight were compared "
    "with fp64.",
    "peak: most memory that a merge held beyond what was there, by PyTorch's allocator, with a new weight that takes "
    "the old one's place.",
)
DISK_NOTES = (
    "A merge ends with all on the disk, cp with all in the system's cache. resident: how far the process's resident "
    "size rose. verified_seconds: of one merge with --verify.",
)
_CHECKED_COLUMNS = 64


class _OnDisk(argparse.Action):
    """Keep the folder, and give the results a name of their own: a machine's of both kinds are to be shown."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        namespace.on_disk, namespace.document = values, DISK_NAME


def add(parser: argparse.ArgumentParser) -> None:
    """The preset's options."""
    parser.add_argument(
        "--shape", type=shape, nargs="+", help=f"OUTxIN ({' '.join('x'.join(map(str, s)) for s in SHAPES)})"
    )
    parser.add_argument(
        "--dtype", type=dtype_name, nargs="+", default=["fp32", "bf16"], help="of the weight (fp32 bf16)"
    )
    parser.add_argument("--rank", type=count, default=16, help="r1 = r2; other methods' ranks follow (%(default)s)")
    parser.add_argument(
        "--on-disk", type=Path, metavar="FOLDER", action=_OnDisk,
        help="merge a checkpoint instead, in a folder with room for three",
    )  # fmt: skip
    parser.add_argument(
        "--depth", type=count, help=f"the checkpoint's layers, of 436 MB each ({DEPTH}; with --quick {QUICK_DEPTH})"
    )
    parser.add_argument("--kills", type=count, help=f"merges that are killed ({KILLS}; with --quick {QUICK_KILLS})")
    add_device(parser)


def run(options: argparse.Namespace, console: Console) -> Results:
    """Measure one or the other."""
    if options.on_disk is not None:
        if not options.on_disk.is_dir():
            raise ValueError(f"--on-disk: got {str(options.on_disk)!r}, expected a folder")
        about = environment(torch.device("cpu"))
        depth = options.depth or (QUICK_DEPTH if options.quick else DEPTH)
        kills = options.kills or (QUICK_KILLS if options.quick else KILLS)
        disk = merge_checkpoint.measure(options.on_disk, depth, options.rank, options.rounds, kills, console)
        return Results("merge", "", about, (disk,), notes=DISK_NOTES)
    about = environment(options.device)
    shapes = options.shape or (QUICK_SHAPES if options.quick else SHAPES)
    cases = tuple(
        _measure(dtype, rows, columns, options.rank, options.device, options.rounds, console)
        for dtype in options.dtype
        for rows, columns in shapes
    )
    return Results("merge", "", about, cases, notes=NOTES)


def _measure(
    dtype: str, rows: int, columns: int, rank: int, device: torch.device, rounds: int, console: Console
) -> Case:
    torch.manual_seed(0)
    weight = frozen_linear(columns, rows, DTYPE_NAMES[dtype], device).weight
    some = torch.arange(0, columns, -(-columns // _CHECKED_COLUMNS), device=device)
    ones = torch.nn.functional.one_hot(some, columns).to(weight.dtype)  # X Wᵀ are then these columns
    checker = Checker(Layer(weight, ones, None, rank))
    found = Subjects(runs={COPY: copying(weight)})
    for name in SUBJECTS:
        with found.unless_it_fails(name):
            linear = frozen_linear(columns, rows, DTYPE_NAMES[dtype], device)
            linear.weight.copy_(weight)
            module = build(name, linear, rank, rank)
            checker.give_values(name, module)
            call = merging(name, module)
            call()
            errors = checker.errors(name, [merged_weight(module)[:, some].t()])
            found.decide(name, {"weight": errors["output"]}, call)
    seconds = interleaved(found.runs, rounds=rounds, warmup=1, device=device, console=console)
    traces = found.traced(device, ("peak",))
    settings: dict[str, Setting] = {
        "kind": "merge", "dtype": dtype, "out_features": rows, "in_features": columns, "rank": rank, "base": "dense",
    }  # fmt: skip
    return found.case(settings, COPY, (COPY, *SUBJECTS), seconds, traces)


def table(case: Case) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and cells of one case."""
    at = case.settings
    if at["kind"] == merge_checkpoint.KIND:
        own = case.subjects["dual_lora"].counts
        title = (
            f"Merging into a checkpoint of {own['checkpoint_bytes'] / 1e6:,.0f} MB in {at['layers']} files; with "
            f"--verify {own['verified_seconds']:,.1f} s; {own['kills']:g} kills, {own['kills_in_the_middle']:g} in the "
            "middle, and then the same bytes"
        )
    else:
        title = f"Merging into {at['out_features']}x{at['in_features']}, {at['dtype']}, r1=r2={at['rank']}"
    headings = ["subject", "median ms", f"× {LABELS[case.reference]}", "quartiles", "memory MiB"]
    return title, headings, [_row(case, name, of) for name, of in case.subjects.items()]


def _row(case: Case, name: str, measured: Measurement) -> list[str]:
    if measured.left_out is not None:
        return [LABELS[name], measured.left_out, "–", "–", "–"]
    ratio = case.ratio(name)
    memory = next((f"{size / MEBIBYTE:,.1f}" for size in measured.bytes.values()), "–")
    times = f"{case.seconds(name).median * 1e3:,.1f}", f"{ratio.median:.2f}", f"{ratio.lower:.2f} to {ratio.upper:.2f}"
    return [LABELS[name], *times, memory]
