"""What GPUs have measured; or that none has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from ..gpu.document import LABELS as LAYER_LABELS
from ..harness.results import Case
from ..layers.layer_cells import MODES
from ..layers.methods import LABELS
from .models import tokens_per_second
from .shown import (
    Machine,
    left_out,
    machines,
    mebibytes,
    milliseconds,
    own,
    ratio,
    size,
    sources,
    table,
    tokens,
)

NOTHING = (
    "No GPU has run this yet. `python -m benchmarks gpu` measures one within eight minutes, and its document's tables "
    "then stand here."
)
_KINDS = {"step": "Step of one layer, time over the three products", "decode": "Decoding, time over F.linear on W0"}


def by_machine() -> str:
    """Layers and models of every GPU."""
    found = machines("gpu", lambda _: True)
    return "\n\n".join(chain.from_iterable(map(_of_machine, of_gpus(found)))) or NOTHING


def of_gpus(found: list[Machine]) -> list[Machine]:
    """Without Triton's interpreter on a CPU, whose times mean nothing."""
    return [machine for machine in found if machine.runs[0].environment["device"] != "cpu"]


def _of_machine(machine: Machine) -> Iterator[str]:
    yield f"### {machine.label}"
    for kind, words in _KINDS.items():
        cases = sorted((case for case in machine.cases.values() if case.settings["kind"] == kind), key=_order)
        if cases:
            yield f"{words}, bf16, r1 = r2 = {cases[0].settings['rank']}:"
            yield _layers(cases)
    models = [case for case in machine.cases.values() if case.settings["kind"] == "train"]
    if models:
        yield "Training step of whole models, bf16:"
        yield _models(models)
    layers = [case for case in machine.cases.values() if case.settings["kind"] in _KINDS]
    if missing := list(dict.fromkeys([*left_out(layers, _layer), *left_out(models, _model)])):
        yield "Left out:\n\n" + "\n".join(f"- {sentence}" for sentence in missing)
    yield "Measured by:\n\n" + sources(machine.runs)


def _order(case: Case) -> tuple[int, int, int, int]:
    about = case.settings
    return (
        MODES.index(str(about["mode"])),
        int(about["out_features"]),
        int(about["in_features"]),
        int(about["tokens"]),
    )


def _layer(case: Case) -> str:
    return f"{case.settings['kind']}, {case.settings['mode']}, {size(case)}, {tokens(case)}"


def _layers(cases: list[Case]) -> str:
    reference = cases[0].reference
    names = [name for name in LAYER_LABELS if name != reference and any(name in case.subjects for case in cases)]
    return table(
        ["", "launches", f"{LAYER_LABELS[reference]}, ms", *(own(name, LAYER_LABELS[name]) for name in names)],
        (
            [
                f"{size(case)}, {tokens(case)}",
                str(case.settings["mode"]),
                milliseconds(case, reference),
                *(own(name, ratio(case, name)) for name in names),
            ]
            for case in cases
        ),
    )


def _models(cases: list[Case]) -> str:
    return table(
        ["model", "method", "ms", "tokens/s", "/ its floor", "held MiB", "peak MiB"],
        (
            [
                _model(case),
                own(name, LABELS[name]),
                own(name, milliseconds(case, name)),
                own(name, tokens_per_second(case, name)),
                own(name, ratio(case, name)),
                own(name, mebibytes(case, name, "held")),
                own(name, mebibytes(case, name, "peak")),
            ]
            for case in cases
            for name in case.timed()
        ),
    )


def _model(case: Case) -> str:
    about = case.settings
    return f"{about['model']}, {about['batch']} × {about['sequence']}" + (
        ", checkpointed" if about["checkpointing"] else ""
    )


TABLES = {"gpu-machine": by_machine}
