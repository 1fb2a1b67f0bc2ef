"""Whole models: tokens per second, time over the model's own floor, and memory, on each machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..harness.report import MEBIBYTE
from ..harness.results import Case
from ..layers.methods import LABELS
from .pictures import Picture, dots
from .shown import (
    MISSING,
    OWN,
    SUMMARISED,
    Machine,
    brief,
    machines,
    mebibytes,
    milliseconds,
    not_measured,
    own,
    ratio,
    sources,
    spread,
    subjects_of,
    table,
)
from .studies import load

_LEAST_HIDDEN = 1024
"""Hidden size from which a model is large enough for summaries: below, Python weighs as much as arithmetic."""
_LEAST_TOKENS = 256
"""A step, likewise: with few, what every step costs whatever its tokens, such as AdamW, hides the methods."""
_REFERENCES = {"floor": "the model's floor", "frozen": "the frozen model's"}
"""What ratios are to → the possessive of it. Runs from before there was a model's floor have the frozen model."""


def _is_training(case: Case) -> bool:
    return case.settings["kind"] == "train"


def _is_summarised(case: Case) -> bool:
    about = case.settings
    plain = about.get("base") == "dense" and not about.get("checkpointing") and "busy_processes" not in about
    large = int(about.get("hidden_size", 0)) >= _LEAST_HIDDEN and int(about.get("tokens", 0)) >= _LEAST_TOKENS
    return _is_training(case) and plain and large


def _is_generation(case: Case) -> bool:
    return case.settings["kind"] == "generate"


def describe(case: Case) -> str:
    """The case in words, such as ``llama-h1024, 8 layers, bf16, 4 × 256 tokens``."""
    about = case.settings
    special = {
        "in NF4": about.get("base") == "nf4",
        "checkpointed": about.get("checkpointing"),
        f"r = {about['rank']}": about["rank"] != 16,
        f"beside {about.get('busy_processes')} busy processes": "busy_processes" in about,
        f"{about.get('new_tokens')} generated": "new_tokens" in about,
    }
    words = [
        str(about["model"]),
        f"{about['layers']} layers",
        str(about["dtype"]),
        *(name for name, applies in special.items() if applies),
    ]
    return ", ".join([*words, f"{about['batch']} × {about['sequence']} tokens"])


def _order(case: Case) -> tuple[Any, ...]:
    about = case.settings
    return (
        -int(about["hidden_size"]),
        *(str(about.get(name, "")) for name in ("dtype", "base", "checkpointing")),
        describe(case),
    )


def tokens_per_second(case: Case, name: str) -> str:
    """By the median time."""
    if name not in case.timed():
        return MISSING
    value = case.subjects[name].counts["tokens"] / case.seconds(name).median
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _cases(of: Sequence[Machine]) -> list[tuple[Machine, Case]]:
    return [(machine, case) for machine in of for case in sorted(machine.cases.values(), key=_order)]


def _summarised(columns: Sequence[tuple[Machine, Case]]) -> list[str]:
    return [name for name in subjects_of(case for _, case in columns) if name in SUMMARISED]


def summary() -> str:
    """Training steps of the models that are large enough: tokens per second, time over the floor, and peak memory."""
    of = machines("model", _is_summarised)
    columns = _cases(of)
    names = _summarised(columns)
    places = [f"{machine.label}<br>{describe(case)}" for machine, case in columns]
    speed = table(
        ["tokens/s · time / the model's floor", *places],
        ([own(name, LABELS[name]), *(own(name, _speed(case, name)) for _, case in columns)] for name in names),
    )
    memory = table(
        ["peak MiB in a step · resident MiB", *places],
        (
            [own(name, LABELS[name]), *(own(name, _memory(case, name)) for _, case in columns)]
            for name in names
            if any(_memory(case, name) != MISSING for _, case in columns)
        ),
    )
    held = [memory] if any(_memory(case, name) != MISSING for _, case in columns for name in names) else []
    return "\n\n".join([speed, *held, "\n".join(brief(machine) for machine in of)])


def _speed(case: Case, name: str) -> str:
    speed, over = tokens_per_second(case, name), ratio(case, name, "floor")
    return speed if MISSING in (speed, over) else f"{speed} · {over}"


def _memory(case: Case, name: str) -> str:
    peak, resident = mebibytes(case, name, "peak"), mebibytes(case, name, "resident")
    return MISSING if peak == MISSING else f"{peak} · {resident}"


def by_machine() -> str:
    """Every training step that was measured, in detail, and the runs they are from."""
    return "\n\n".join(part for machine in machines("model", _is_training) for part in _of_machine(machine))


def _of_machine(machine: Machine) -> Iterator[str]:
    cases = sorted(machine.cases.values(), key=_order)
    yield f"### {machine.label}"
    for case in cases:
        yield f"{describe(case)}:"
        yield _detail(case)
    yield from not_measured(cases, describe)
    yield "Measured by:\n\n" + sources(machine.runs)


def _detail(case: Case) -> str:
    reference = _REFERENCES[case.reference]
    headings = (
        "",
        "ms",
        "tokens/s",
        f"time / {reference} (quartiles)",
        "/ LoRA's",
        "held MiB",
        "peak MiB",
        "resident MiB",
    )
    rows = (
        [
            own(name, LABELS[name]),
            own(name, milliseconds(case, name)),
            own(name, tokens_per_second(case, name)),
            own(name, spread(case, name)),
            own(name, ratio(case, name, "lora")),
            *(own(name, mebibytes(case, name, kind)) for kind in ("held", "peak", "resident")),
            f"{trainable:,}" if (trainable := case.subjects[name].trainable) else MISSING,
            f"{share:.0%}" if (share := case.subjects[name].counts.get("share_products")) else MISSING,
        ]
        for name in subjects_of([case])
        if name in case.timed()
    )
    return table((*headings, "trainable", "of it products"), rows)


def generation() -> str:
    """Greedy generation, batch 1: tokens per second, and time over that of the model without an adapter."""
    return "\n\n".join(part for machine in machines("model", _is_generation) for part in _generation(machine)) or (
        "No machine has measured generation yet."
    )


def _generation(machine: Machine) -> Iterator[str]:
    cases = sorted(machine.cases.values(), key=_order)
    yield f"### {machine.label}"
    yield table(
        ["tokens/s · time / without an adapter", *map(describe, cases)],
        (
            [own(name, LABELS[name]), *(own(name, _generated(case, name)) for case in cases)]
            for name in subjects_of(cases)
        ),
    )
    yield from not_measured(cases, describe)
    yield "Measured by:\n\n" + sources(machine.runs)


def _generated(case: Case, name: str) -> str:
    speed = tokens_per_second(case, name)
    return speed if speed == MISSING else f"{speed} · {ratio(case, name)}"


def comparison() -> str:
    """PEFT's published figures, and beside them what was measured here, both over LoRA's."""
    published = load("peft_method_comparison")
    methods = published["methods"]
    of = machines("model", lambda case: _is_summarised(case) and "lora" in case.timed())
    here = [
        (machine, min(machine.cases.values(), key=lambda case: (-int(case.settings["tokens"]), *_order(case)[:2])))
        for machine in of
    ]
    headings = ["", "PEFT: time s", "/ LoRA's", "PEFT: peak GB", "/ LoRA's"]
    for machine, case in here:
        headings += [f"{machine.label}<br>{describe(case)}: time / LoRA's", "memory / LoRA's", "trainable"]
    rows = []
    for name in subjects_of(case for _, case in here):
        row = [own(name, LABELS[name])]
        if name in methods:
            seconds, gigabytes = methods[name]["seconds"], methods[name]["gigabytes"]
            row += [f"{seconds:,}", f"{seconds / methods['lora']['seconds']:.2f}"]
            row += [f"{gigabytes}", f"{gigabytes / methods['lora']['gigabytes']:.2f}"]
        else:
            row += [MISSING] * 4
        for _, case in here:
            trainable = case.subjects[name].trainable if name in case.subjects else None
            row += [own(name, ratio(case, name, "lora")), own(name, _memory_ratio(case, name))]
            row.append(f"{trainable:,}" if trainable else MISSING)
        rows.append(row)
    source = f"[{published['source']}]({published['url']})"
    note = (
        f"{source}: {published['model']}, {published['task']}, {published['device']}. All of rank 32 there, which for "
        "LoHa is twice as many parameters; equal numbers here. Memory: there the accelerator's peak, here model, "
        "adapters, optimiser and the peak of a step."
    )
    return "\n\n".join([table(headings, rows), note, "\n".join(brief(machine) for machine in of)])


def _total(case: Case, name: str) -> int | None:
    found = case.subjects[name].bytes if name in case.subjects else {}
    return found["held"] + found["peak"] if {"held", "peak"} <= found.keys() else None


def _memory_ratio(case: Case, name: str) -> str:
    mine, lora = _total(case, name), _total(case, "lora")
    return MISSING if mine is None or lora is None else f"{mine / lora:.2f}"


def _numbers() -> dict[str, Any]:
    columns = _cases(machines("model", _is_summarised))
    names = _summarised(columns)
    times: dict[str, dict[str, dict[str, list[float]]]] = {}
    memory: dict[str, dict[str, dict[str, list[float]]]] = {}
    for machine, case in columns:
        over = f"{describe(case)}\ntime / {_REFERENCES[case.reference]}"
        found = {name: case.ratio(name) for name in names if name in case.timed()}
        times.setdefault(over, {})[machine.label] = {LABELS[n]: [q.lower, q.median, q.upper] for n, q in found.items()}
        held = {LABELS[n]: [peak / MEBIBYTE] * 3 for n in found if (peak := case.subjects[n].bytes.get("peak"))}
        if held:
            memory.setdefault(f"{describe(case)}\npeak of a step, MiB", {})[machine.label] = held
    return {"times": times, "memory": memory, "labels": [LABELS[name] for name in names], "own": LABELS[OWN]}


def _draw(numbers: Any) -> Figure:
    lines = dict.fromkeys(numbers["times"], 1.0)
    title = "A model's training step at equal trainable parameters"
    return dots(numbers["times"] | numbers["memory"], numbers["labels"], numbers["own"], title, lines)


TABLES = {
    "model-summary": summary,
    "model-machine": by_machine,
    "model-generate": generation,
    "peft-comparison": comparison,
}
PICTURES = {
    "bench_model": Picture(
        "Time over the model's floor, and peak memory, of a whole model's training step with each method",
        _numbers,
        _draw,
    )
}
