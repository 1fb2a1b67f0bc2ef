"""The cost model beside what was measured, and its estimate for a model of 70 billion parameters."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from matplotlib.figure import Figure

from ..harness.results import Case
from ..layers.methods import LABELS
from ..scale.compare import Comparison, comparable, comparisons
from ..scale.compare import typical_error as typical
from ..scale.cost import Rates
from ..scale.exponents import AXES
from ..scale.large_model import CAPACITY, CHIP, chip_rates, estimates
from ..scale.rates import KIND, rates
from . import layers, models, scale
from .pictures import PADDED, Picture
from .shown import MISSING, Machine, machines, own, table
from .studies import load

_SOURCES = {"layer": "layers", "scale": "growth", "model": "whole models"}
"""Preset → what its cases are called here."""


def predicted() -> str:
    """Rates of each machine that has measured them, and every step predicted from these, beside the measured one."""
    return "\n\n".join(part for machine in _with_rates() for part in _of_machine(machine))


def _with_rates() -> list[Machine]:
    return machines("scale", lambda case: case.settings["kind"] == KIND and case.settings["dtype"] == "fp32")


def _rates_of(machine: Machine) -> Rates:
    return rates(next(iter(machine.cases.values())))


def _compared(machine: Machine) -> dict[str, list[Comparison]]:
    """What the same machine has measured, by preset."""
    found = {
        preset: [
            each
            for other in machines(preset, comparable)
            if other.label == machine.label
            for each in comparisons(_in_order(other.cases.values()), _rates_of(machine))
        ]
        for preset in _SOURCES
    }
    return {preset: of for preset, of in found.items() if of}


def _in_order(cases: Iterable[Case]) -> list[Case]:
    """By what is compared, from the smallest on."""
    return sorted(cases, key=lambda case: (str(case.settings.get("axis", "")), case.seconds(case.timed()[0]).median))


def _of_machine(machine: Machine) -> Iterator[str]:
    own_rates, compared = _rates_of(machine), _compared(machine)
    yield f"### {machine.label}"
    yield f"Rates: {_words(own_rates)}."
    for preset, found in compared.items():
        names = [name for name in LABELS if any(each.subject == name for each in found)]
        yield (
            f"Time over the floor, {_SOURCES[preset]}: measured / predicted. Half of the {len(found)} predictions are "
            f"within a factor of {typical(found):.2f}; of this package alone, "
            f"{typical([each for each in found if each.subject == 'dual_lora']):.2f}."
        )
        yield table(["", *(own(name, LABELS[name]) for name in names)], _rows(preset, found, names))


def _words(found: Rates) -> str:
    new = "" if found.new_bytes == found.bytes else f" ({found.new_bytes / 1e9:,.1f} into new memory)"
    return (
        f"products {found.products / 1e9:,.0f} GFLOP/s, copies {found.bytes / 1e9:,.1f} GB/s read and written{new}, "
        f"generation of W {found.generation / 1e9:,.0f} billion operations a second, "
        f"{found.launch * 1e6:,.1f} µs a launch"
    )


def _rows(preset: str, found: list[Comparison], names: list[str]) -> Iterator[list[str]]:
    described = {"layer": layers.describe, "scale": scale.describe, "model": models.describe}[preset]
    cases = list({id(each.case): each.case for each in found}.values())
    for case in _ends(cases) if preset == "scale" else cases:
        of = {each.subject: f"{each.measured:.2f} / {each.predicted:.2f}" for each in found if each.case is case}
        yield [described(case), *(own(name, of.get(name, MISSING)) for name in names)]


def _ends(cases: list[Case]) -> Iterator[Case]:
    for axis, grown in AXES.items():
        along = sorted((case for case in cases if case.settings["axis"] == axis), key=lambda c: grown(c.settings))
        yield from along[:1] + along[1:][-1:]


def large_model() -> str:
    """Llama-3-70B on one chip and on eight: all estimated."""
    document = load("step_model_h200")
    found = {each.method: each for each in estimates(document)}
    layouts = list(found["dual_lora"].gigabytes)
    rows = (
        [
            own(name, "floor: three products a layer" if name == "floor" else LABELS[name]),
            *(
                own(name, text)
                for text in (
                    f"{each.seconds:.1f}", f"{each.to_floor:.2f}", f"{each.seconds / found['lora'].seconds:.2f}",
                    *(_gigabytes(each.gigabytes.get(layout)) for layout in layouts),
                )
            ),
        ]
        for name, each in found.items()
    )  # fmt: skip
    headings = ["", "s a step", "/ floor", "/ LoRA", *(f"GB a GPU, {layout}" for layout in layouts)]
    return (
        f"Estimated, nothing of it measured: {CHIP}, 8192 tokens a GPU, r1 = r2 = 16 (32 for LoRA and DoRA), every "
        f"block checkpointed. Rates: {_words(chip_rates(document))}.\n\n{table(headings, rows)}\n\n"
        f"Too much: more than the chip's {CAPACITY / 1e9:.0f} GB."
    )


def _gigabytes(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}{', too much' if value > CAPACITY / 1e9 else ''}"


def _points() -> dict[str, Any]:
    """Machine → subject → [[measured, predicted], …]."""
    found: dict[str, Any] = {}
    for machine in _with_rates():
        for each in (each for of in _compared(machine).values() for each in of):
            points = found.setdefault(machine.label, {}).setdefault(each.subject, [])
            points.append([each.measured, each.predicted])
    return found


def _draw(points: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(5.6 * max(1, len(points)), 5.6), layout=PADDED)
    rows = figure.subplots(1, max(1, len(points)), squeeze=False)[0]
    names = [name for name in LABELS if any(name in of for of in points.values())]
    for axes, (machine, of) in zip(rows, points.items(), strict=False):
        for name, found in of.items():
            measured, expected = zip(*found, strict=True)
            marker = "D" if name == "dual_lora" else "o"
            axes.plot(measured, expected, marker, color=f"C{names.index(name)}", label=LABELS[name], markersize=4.5)
        every = [value for found in of.values() for point in found for value in point]
        ends = [min(every) / 1.1, max(every) * 1.1]
        axes.plot(ends, ends, color="black", linewidth=1, zorder=0)
        typical_ratio = statistics.median(p / m for found in of.values() for m, p in found)
        axes.set_title(f"{machine}\nmedian of predicted / measured: {typical_ratio:.2f}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("time over the floor, measured", fontsize=9)
        axes.set_ylabel("predicted", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


TABLES = {"cost-predicted": predicted, "cost-70b": large_model}
PICTURES = {
    "bench_cost": Picture(
        "A step's time over the floor: the cost model's prediction against the measurement", _points, _draw
    )
}
