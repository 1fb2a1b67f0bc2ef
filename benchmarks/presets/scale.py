"""``python -m benchmarks scale``: how a step's time and memory grow with tokens, layer size, rank and depth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from rich.console import Console

from ..harness.environment import DTYPE_NAMES, environment
from ..harness.report import MEBIBYTE
from ..harness.results import Case, Measurement, Results, Setting
from ..harness.timing import interleaved
from ..layers.checks import Checker
from ..layers.claims import Layer
from ..layers.layer_step import FLOOR, step
from ..layers.methods import LABELS, trainable_parameters
from ..layers.subjects import Subjects
from ..scale import rates
from ..scale.exponents import AXES
from ..scale.stacks import frozen_layers, stack, stack_floor
from .arguments import add_device
from .arguments import dtype as dtype_name

HELP = "Growth of a step's time and temporary memory with tokens, layer size, rank and depth, and the machine's rates."
SUBJECTS = (FLOOR, "lora", "dora", "naive", "dual_lora_eager", "dual_lora")
NOTES = (
    "A point is a training step of a stack of square layers, without nonlinearities between them: forward, then "
    "backward to the input and all adapters. temporary: memory that the step held at one moment and released again, by "
    "PyTorch's allocator, in a pass of its own. Single layers were checked against fp64 before they were timed.",
    "rates: three products of a 2048² layer and 512 tokens, a copy of its weight, one of a "
    "4096² weight into new memory, merging, and operations on a single number, forward and backward.",
)


@dataclass(frozen=True)
class Point:
    """One square layer, or a stack of them, and a step's tokens."""

    axis: str
    size: int
    tokens: int
    rank: int = 16
    layers: int = 1

    def settings(self, dtype: str) -> dict[str, Setting]:
        """In the suite's words."""
        return {
            "kind": "step", "axis": self.axis, "dtype": dtype, "out_features": self.size, "in_features": self.size,
            "tokens": self.tokens, "rank": self.rank, "base": "dense", "layers": self.layers,
        }  # fmt: skip


def _points(
    size: int, tokens: tuple[int, ...], sizes: tuple[int, ...], ranks: tuple[int, ...], layers: tuple[int, ...], of: int
) -> tuple[Point, ...]:
    """Every axis from its smallest point to its largest; `of` tokens where these do not grow."""
    return (
        *(Point("tokens", size, each) for each in tokens),
        *(Point("size", each, of) for each in sizes),
        *(Point("rank", size, of, rank=each) for each in ranks),
        *(Point("depth", size, of, layers=each) for each in layers),
    )


POINTS: Mapping[str, tuple[Point, ...]] = MappingProxyType(
    {
        "cpu": _points(
            1024,
            (16, 64, 256, 1024, 4096),
            (256, 512, 1024, 2048, 4096),
            (4, 8, 16, 32, 64, 128),
            (1, 2, 4, 8, 16),
            256,
        ),
        "cuda": _points(
            4096,
            (16, 64, 256, 1024, 4096, 16384),
            (1024, 2048, 4096, 8192),
            (4, 8, 16, 32, 64, 128),
            (1, 2, 4, 8),
            2048,
        ),
    }
)
QUICK = _points(256, (32, 128, 512), (128, 256, 512), (4, 16, 64), (1, 2, 4), 64)


def add(parser: argparse.ArgumentParser) -> None:
    """The preset's options."""
    parser.add_argument("--axis", nargs="+", choices=list(AXES), default=list(AXES), help="what grows (all)")
    parser.add_argument("--dtype", type=dtype_name, help="of the layers (fp32 on a CPU, bf16 on a GPU)")
    add_device(parser)


def run(options: argparse.Namespace, console: Console) -> Results:
    """Measure the machine's rates, then every point of the axes that were asked for."""
    device: torch.device = options.device
    dtype = options.dtype or ("fp32" if device.type == "cpu" else "bf16")
    about = environment(device)
    points = [point for point in (QUICK if options.quick else POINTS[device.type]) if point.axis in options.axis]
    cases = [rates.measure(dtype, device, options.rounds, console)]
    for index, point in enumerate(points, 1):
        console.print(f"{index} of {len(points)}: {describe(point.settings(dtype))}", style="dim", highlight=False)
        cases.append(_measure(point, dtype, device, options.rounds, console))
    return Results("scale", "", about, tuple(cases), notes=NOTES)


def _measure(point: Point, dtype: str, device: torch.device, rounds: int, console: Console) -> Case:
    torch.manual_seed(0)
    layers = frozen_layers(point.size, point.layers, DTYPE_NAMES[dtype], device)
    x, grad = (torch.randn(point.tokens, point.size, dtype=DTYPE_NAMES[dtype], device=device) for _ in range(2))
    x.requires_grad_()
    checker = Checker(Layer(layers[0].weight, x, grad, point.rank)) if point.layers == 1 else None
    found = Subjects()
    for name in SUBJECTS:
        with found.unless_it_fails(name):
            call: Callable[[], Sequence[torch.Tensor]]
            names: list[str] = []
            if name == FLOOR:
                call = stack_floor([layer.weight for layer in layers], x, grad)
            else:
                module = stack(name, layers, point.rank)
                names = [] if checker is None else checker.give_values(name, module)
                found.trainable[name] = sum(each.numel() for each in trainable_parameters(module))
                call = step(module, x, grad)
            found.decide(name, _errors(name, call, checker, names), call)
    if FLOOR in found.left_out:
        raise RuntimeError(f"{describe(point.settings(dtype))}: the floor {found.left_out[FLOOR]}")
    del checker  # with the truths, several times as large as the layer
    seconds = interleaved(found.runs, rounds=rounds, warmup=1, device=device, console=console)
    traces = found.traced(device, ("temporary",))
    return found.case(point.settings(dtype), FLOOR, SUBJECTS, seconds, traces)


def _errors(
    name: str, call: Callable[[], Sequence[torch.Tensor]], checker: Checker | None, names: Sequence[str]
) -> dict[str, float]:
    """Of a single layer; a stack has no checker, but runs once too, since here it may fail."""
    returned = call()
    return {} if checker is None else checker.errors(name, returned, names)


def describe(settings: Mapping[str, Setting]) -> str:
    """A case in words."""
    if settings["kind"] == rates.KIND:
        return f"The machine's rates, {settings['dtype']}"
    layers = "" if settings["layers"] == 1 else f"{settings['layers']} layers of "
    return (
        f"Growth with {settings['axis']}: {layers}{settings['out_features']}², {settings['tokens']} tokens, "
        f"r1=r2={settings['rank']}, {settings['dtype']}"
    )


def table(case: Case) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and cells of one case."""
    if case.settings["kind"] == rates.KIND:
        found = rates.rates(case)
        cells = [
            ["products", f"{found.products / 1e9:,.1f} GFLOP/s"],
            ["copies", f"{found.bytes / 1e9:,.1f} GB/s read and written"],
            ["copies into new memory", f"{found.new_bytes / 1e9:,.1f} GB/s"],
            ["generation of W", f"{found.generation / 1e9:,.1f} G operations/s"],
            ["a launch", f"{found.launch * 1e6:,.2f} µs"],
        ]
        return describe(case.settings), ["what", "rate"], cells
    headings = ["method", "median ms", "× floor", "quartiles", "temporary MiB"]
    return describe(case.settings), headings, [_row(case, name, of) for name, of in case.subjects.items()]


def _row(case: Case, name: str, measured: Measurement) -> list[str]:
    if measured.left_out is not None:
        return [LABELS[name], measured.left_out, "–", "–", "–"]
    ratio = case.ratio(name)
    return [
        LABELS[name], f"{case.seconds(name).median * 1e3:,.2f}", f"{ratio.median:.2f}",
        f"{ratio.lower:.2f} to {ratio.upper:.2f}", f"{measured.bytes['temporary'] / MEBIBYTE:,.1f}",
    ]  # fmt: skip
