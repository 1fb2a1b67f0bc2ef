"""How time grows with tokens, layer size, rank and depth, and what merging takes, on each machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from ..harness.results import Case
from ..layers.methods import LABELS
from ..scale.exponents import AXES, exponents
from .pictures import PADDED, Picture
from .shown import (
    MISSING,
    Machine,
    left_out,
    machines,
    mebibytes,
    milliseconds,
    own,
    ratio,
    size,
    sources,
    spread,
    subjects_of,
    table,
)

_GROWN = {"tokens": "tokens M", "size": "weights N × K", "rank": "rank r1 = r2", "depth": "layers in one graph"}
"""Axis → what grows along it."""


def _is_growth(case: Case) -> bool:
    return "axis" in case.settings


def _is_merging(case: Case) -> bool:
    return str(case.settings["kind"]).startswith("merge")


def exponents_table() -> str:
    """Exponents along each axis on each machine, with the interval of 90 % of the draws."""
    return "\n\n".join(part for machine in machines("scale", _is_growth) for part in _of_machine(machine))


def _of_machine(machine: Machine) -> Iterator[str]:
    cases = list(machine.cases.values())
    names = subjects_of(cases)
    found = {axis: exponents(cases, axis) for axis in AXES}
    rows = (
        [_GROWN[axis], _sizes(axis, of), *(own(name, _exponent(of, name)) for name in names)]
        for axis, of in found.items()
        if of
    )
    yield f"### {machine.label}"
    yield table(["growth with", "fitted to", *(own(name, LABELS[name]) for name in names)], rows, words=(0, 1))
    yield "Ends of each axis, time over the three products · temporary MiB:"
    yield table(["", *(own(name, LABELS[name]) for name in names)], _ends(cases, names))
    yield "Measured by:\n\n" + sources(machine.runs)


def _sizes(axis: str, of: Any) -> str:
    sizes = next(iter(of.values())).sizes
    shown = [f"{round(each**0.5)}²" if axis == "size" else f"{each:,}" for each in (sizes[0], sizes[-1])]
    return " to ".join(shown)


def _exponent(of: Any, name: str) -> str:
    if name not in of:
        return MISSING
    found = of[name]
    return f"{found.value:.2f} ({found.lower:.2f} to {found.upper:.2f})"


def _ends(cases: list[Case], names: list[str]) -> Iterator[list[str]]:
    for axis, grown in AXES.items():
        own_cases = sorted((case for case in cases if case.settings["axis"] == axis), key=lambda c: grown(c.settings))
        for case in own_cases[:1] + own_cases[-1:]:
            times = (f"{ratio(case, name)} · {mebibytes(case, name, 'temporary')}" for name in names)
            yield [describe(case), *(own(name, text) for name, text in zip(names, times, strict=True))]


def describe(case: Case) -> str:
    """A point in words."""
    at = case.settings
    layers = "" if at["layers"] == 1 else f"{at['layers']} layers of "
    rank = "" if at["rank"] == 16 else f", r = {at['rank']}"
    return f"{layers}{size(case)}, {at['tokens']:,} tokens{rank}"


def merging() -> str:
    """Merging one layer in memory, and a checkpoint on disk, on each machine."""
    return "\n\n".join(part for machine in machines("merge", _is_merging) for part in merging_of(machine))


def merging_of(machine: Machine) -> Iterator[str]:
    """The parts of one machine's."""
    yield f"### {machine.label}"
    cases = list(machine.cases.values())
    layers = [case for case in cases if case.settings["kind"] == "merge"]
    if layers:
        names = subjects_of(layers)
        columns = [name for name in names if name != "copy"]
        headings = ["time / copying the weight · peak MiB", "copy, ms", *(own(name, LABELS[name]) for name in columns)]
        rows = (
            [
                f"{case.settings['dtype']}, {size(case)}", milliseconds(case, "copy"),
                *(own(name, f"{ratio(case, name)} · {mebibytes(case, name, 'peak')}") for name in columns),
            ]
            for case in layers
        )  # fmt: skip
        yield table(headings, rows)
    for case in cases:
        if case.settings["kind"] == "merge_on_disk":
            yield _on_disk(case)
    missing = list(left_out(layers, lambda case: f"{case.settings['dtype']}, {size(case)}"))
    if missing:
        yield "Left out:\n\n" + "\n".join(f"- {sentence}" for sentence in missing)
    yield "Measured by:\n\n" + sources(machine.runs)


def _on_disk(case: Case) -> str:
    about = case.subjects["dual_lora"].counts
    megabytes = about["checkpoint_bytes"] / 1e6
    rows = (
        [
            own(name, "`dual-lora merge`" if name == "dual_lora" else LABELS[name]),
            f"{megabytes / case.seconds(name).median:,.0f}", spread(case, name), mebibytes(case, name, "resident"),
        ]
        for name in case.timed()
    )  # fmt: skip
    text = table(["", "MB/s", "time / cp (quartiles)", "resident MiB"], rows)
    return (
        f"A checkpoint of {megabytes:,.0f} MB in {case.settings['layers']} files, on disk:\n\n{text}\n\n"
        f"With `--verify` {megabytes / about['verified_seconds']:,.0f} MB/s. After {about['kills']:g} kills, "
        f"{about['kills_in_the_middle']:g} of them in the middle of merging, the files' bytes were "
        f"{'the same' if about['identical_after_kills'] else 'different'}."
    )


def _series() -> dict[str, Any]:
    """Machine → axis → subject → [[size, seconds], …]."""
    found: dict[str, Any] = {}
    for machine in machines("scale", _is_growth):
        for case in machine.cases.values():
            axis = str(case.settings["axis"])
            for name in case.timed():
                point = [AXES[axis](case.settings), case.seconds(name).median]
                found.setdefault(machine.label, {}).setdefault(axis, {}).setdefault(name, []).append(point)
    return found


def _draw(series: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.6, 3.4 * 2 * max(1, len(series))), layout=PADDED)
    rows = figure.subplots(2 * max(1, len(series)), 2, squeeze=False)
    names = [name for name in LABELS if any(name in of for axes in series.values() for of in axes.values())]
    for index, (machine, axes_of) in enumerate(series.items()):
        for axes, (axis, of) in zip(rows[2 * index : 2 * index + 2].flat, axes_of.items(), strict=False):
            for name, points in of.items():
                sizes, seconds = zip(*sorted(points), strict=True)
                width = 2.4 if name == "dual_lora" else 1.2
                axes.plot(sizes, [1e3 * each for each in seconds], "o-", color=f"C{names.index(name)}",
                          label=LABELS[name], linewidth=width, markersize=3.5)  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{machine}: {_GROWN[axis]}", fontsize=9)
            axes.set_ylabel("ms a step", fontsize=9)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle("Growth of a training step's time", fontsize=11)
    return figure


TABLES = {"scale-exponents": exponents_table, "merge-machine": merging}
PICTURES = {
    "bench_scale": Picture("A step's time against tokens, layer size, rank and depth, for each method", _series, _draw)
}
