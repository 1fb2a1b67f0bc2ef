"""One layer's training step: what each method takes over the three products, and how much memory, on each machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..harness.report import MEBIBYTE
from ..harness.results import Case, Setting
from ..harness.timing import Quartiles
from ..layers.methods import LABELS
from .pictures import Picture, dots
from .shown import (
    MISSING,
    OWN,
    SUMMARISED,
    Machine,
    brief,
    in_fast_dtypes,
    machines,
    mebibytes,
    milliseconds,
    not_measured,
    own,
    ratio,
    size,
    sources,
    spread,
    subjects_of,
    table,
    tokens,
)

_STANDARD: dict[str, Setting] = {"kind": "step", "out_features": 4096, "in_features": 4096, "tokens": 512, "rank": 16}
"""The layer that summaries show, in both dtypes."""
_DTYPES = ("fp32", "bf16")
_COMPARED = ("lora", "dora", "loha", "hira", "naive", "lora_compiled", "naive_compiled")
"""What this package is held against when its place is stated."""
_LEVEL = 0.03
"""A difference that counts as none: what the median of a few rounds moves by from run to run on a shared machine."""


def _is_step(case: Case) -> bool:
    return case.settings["kind"] == "step" and case.settings.get("base", "dense") == "dense"


def _is_standard(case: Case) -> bool:
    return _is_step(case) and all(case.settings.get(name) == value for name, value in _STANDARD.items())


def describe(case: Case) -> str:
    """The case in words, such as ``fp32, 4096², 512 tokens``."""
    rank = case.settings["rank"]
    return f"{case.settings['dtype']}, {size(case)}, {tokens(case)}" + (
        f", r = {rank}" if rank != _STANDARD["rank"] else ""
    )


def _order(case: Case) -> tuple[Any, ...]:
    about = case.settings
    dtype = about["dtype"]
    area = int(about["out_features"]) * int(about["in_features"])
    return (_DTYPES.index(str(dtype)) if dtype in _DTYPES else len(_DTYPES), -area, about["tokens"], about["rank"])


def summary() -> str:
    """One layer, 4096², 512 tokens, in both dtypes on each machine: time over the floor and temporary memory."""
    of, without = in_fast_dtypes(machines("layer", _is_standard))
    columns = [(m, dtype) for m in of for dtype in _DTYPES]
    headings = ["time / three products · temporary MiB", *(f"{m.label}<br>{dtype}" for m, dtype in columns)]
    names = _summarised(of)
    rows = (
        [
            own(name, LABELS[name]),
            *(own(name, _time_and_memory(machine.where(**_STANDARD, dtype=dtype), name)) for machine, dtype in columns),
        ]
        for name in names
    )
    parts = [table(headings, rows), without, "\n".join(brief(machine) for machine in of)]
    return "\n\n".join(part for part in parts if part)


def _summarised(of: Sequence[Machine]) -> list[str]:
    return [n for n in subjects_of(case for machine in of for case in machine.cases.values()) if n in SUMMARISED]


def _time_and_memory(case: Case | None, name: str) -> str:
    time = ratio(case, name)
    return MISSING if time == MISSING else f"{time} · {mebibytes(case, name, 'temporary')}"


def by_machine() -> str:
    """Everything: the standard layer in detail, the other cases' times and memory, and the runs they are from."""
    return "\n\n".join(part for machine in machines("layer", _is_step) for part in _of_machine(machine))


def _of_machine(machine: Machine) -> Iterator[str]:
    yield f"### {machine.label}"
    for dtype in _DTYPES:
        if case := machine.where(**_STANDARD, dtype=dtype):
            yield f"{describe(case)}, r1 = r2 = {case.settings['rank']}:"
            yield _detail(case)
    cases = sorted(machine.cases.values(), key=_order)
    names = [name for name in subjects_of(cases) if name != "floor"]
    yield "Time over the three products, all cases:"
    yield table(
        ["", "three products, ms", *(own(name, LABELS[name]) for name in names)],
        (
            [describe(case), milliseconds(case, "floor"), *(own(name, ratio(case, name)) for name in names)]
            for case in cases
        ),
    )
    yield "Temporary memory, MiB:"
    yield table(
        ["", *(own(name, LABELS[name]) for name in names)],
        ([describe(case), *(own(name, mebibytes(case, name, "temporary")) for name in names)] for case in cases),
    )
    yield from not_measured(cases, describe)
    yield "Measured by:\n\n" + sources(machine.runs)


def _detail(case: Case) -> str:
    headings = (
        "",
        "ms",
        "/ three products (quartiles)",
        "/ naive",
        "temporary MiB",
        "trainable",
        "error",
    )
    rows = (
        [
            own(name, LABELS[name]),
            own(name, milliseconds(case, name)),
            own(name, spread(case, name)),
            own(name, ratio(case, name, "naive") if "naive" in case.subjects else MISSING),
            own(name, mebibytes(case, name, "temporary")),
            f"{trainable:,}" if (trainable := case.subjects[name].trainable) else MISSING,
            f"{max(checked.values()):.2f}" if (checked := case.subjects[name].checked) else MISSING,
        ]
        for name in subjects_of([case])
    )
    return table(headings, rows)


def standing() -> str:
    """Against each method: in how many cases this package is faster, level, or slower, and where it is slower."""
    of, without = in_fast_dtypes(machines("layer", _is_step))
    shown = table(
        ["this package's step against", "machine", "faster", "level", "slower", "slower in"],
        (
            [LABELS[name], machine.label, *_standing(machine, name)]
            for name in _COMPARED
            for machine in of
            if any(_against(machine, name))
        ),
        words=(0, 1, 5),
    )
    return f"{shown}\n\n{without}" if without else shown


def _against(machine: Machine, name: str) -> list[tuple[float, str]]:
    """This package's time over the other's, and the case in words, for all cases that have both."""
    cases = sorted(machine.cases.values(), key=_order)
    return [(case.ratio(OWN, name).median, describe(case)) for case in cases if {name, OWN} <= set(case.timed())]


def _standing(machine: Machine, name: str) -> list[str]:
    against = _against(machine, name)
    slower = sorted(((value, words) for value, words in against if value > 1 + _LEVEL), reverse=True)
    faster = [value for value, _ in against if value < 1 / (1 + _LEVEL)]
    if not slower:
        where = "nowhere"
    elif len(slower) == len(against):
        least, most = (f"{value:.2f}" for value in (slower[-1][0], slower[0][0]))
        where = "everywhere, by " + (least if least == most else f"{least} to {most}")
    else:
        where = "; ".join(f"{words}: {value:.2f}" for value, words in slower)
    return [str(len(faster)), str(len(against) - len(slower) - len(faster)), str(len(slower)), where]


def columns() -> str:
    """Steps whose factors' gradients are from a part of the columns of H, where they were measured."""
    of = machines("layer", lambda case: _is_step(case) and "dual_lora_half" in case.timed() and size(case) == "4096²")
    cases = [(machine, case) for machine in of for case in sorted(machine.cases.values(), key=_order)]
    headings = ["step / the three products", *(f"{m.label}<br>{c.settings['dtype']}, {tokens(c)}" for m, c in cases)]
    names = ("lora", "dora", "naive", OWN, "dual_lora_half", "dual_lora_quarter")
    rows = ([own(name, LABELS[name]), *(own(name, ratio(case, name)) for _, case in cases)] for name in names)
    return table(headings, rows) + "\n\n" + "\n".join(brief(machine) for machine in of)


def decode() -> str:
    """Few tokens through a layer that is not merged, over the layer without an adapter."""
    return "\n\n".join(
        part
        for machine in machines("decode", lambda case: case.settings["kind"] == "decode")
        for part in _decode(machine)
    )


def _decode(machine: Machine) -> Iterator[str]:
    cases = sorted(machine.cases.values(), key=_order)
    names = [name for name in subjects_of(cases) if name != "frozen"]
    yield f"### {machine.label}"
    yield table(
        ["", f"{LABELS['frozen']}, ms", *(own(name, LABELS[name]) for name in names)],
        (
            [describe(case), milliseconds(case, "frozen"), *(own(name, ratio(case, name, "frozen")) for name in names)]
            for case in cases
        ),
    )
    yield from not_measured(cases, describe)
    yield "Measured by:\n\n" + sources(machine.runs)


def _numbers() -> dict[str, Any]:
    of, _ = in_fast_dtypes(machines("layer", _is_standard))
    names = _summarised(of)
    points: dict[str, dict[str, dict[str, list[float]]]] = {}
    for dtype in _DTYPES:
        times: dict[str, dict[str, list[float]]] = {}
        memory: dict[str, dict[str, list[float]]] = {}
        for machine in of:
            if case := machine.where(**_STANDARD, dtype=dtype):
                found = {name: case.ratio(name) for name in names if name in case.timed()}
                times[machine.label] = {LABELS[name]: _listed(value) for name, value in found.items()}
                held = {name: case.subjects[name].bytes.get("temporary") for name in found}
                memory[machine.label] = {LABELS[n]: [value / MEBIBYTE] * 3 for n, value in held.items() if value}
        points[f"{dtype}: time / three products"] = times
        points[f"{dtype}: temporary memory, MiB"] = memory
    return {"points": points, "labels": [LABELS[name] for name in names], "own": LABELS[OWN]}


def _listed(found: Quartiles) -> list[float]:
    return [found.lower, found.median, found.upper]


def _draw(numbers: Any) -> Figure:
    title = "One layer's training step, 4096 × 4096, 512 tokens, equal trainable parameters"
    line = {name: 1.0 for name in numbers["points"] if "time" in name}
    return dots(numbers["points"], numbers["labels"], numbers["own"], title, line)


TABLES = {
    "layer-summary": summary,
    "layer-machine": by_machine,
    "layer-standing": standing,
    "gradient-columns-time": columns,
    "decode-machine": decode,
}
PICTURES = {
    "bench_layer": Picture(
        "Time over the three products, and temporary memory, of one layer's step with each method on each machine",
        _numbers,
        _draw,
    )
}
