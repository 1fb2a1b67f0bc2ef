"""A session's layer cells as the suite's cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dual_lora_kernels.tuning.kernel_calls import RANK

from ..harness.results import Case, Measurement
from ..layers.layer_cells import CELL_LABELS, SUBJECTS
from ..layers.layer_step import FLOOR
from ..layers.methods import FROZEN

LABELS = {FROZEN: "F.linear on W0", **{SUBJECTS.get(name, name): label for name, label in CELL_LABELS.items()}}


def layer_cases(cells: Sequence[Mapping[str, Any]]) -> Iterator[Case]:
    """What `layer_cells.measure` found, raw rounds and all."""
    for cell in cells:
        yield _case(cell)


def _case(cell: Mapping[str, Any]) -> Case:
    reference = FLOOR if cell["kind"] == "step" else FROZEN
    names = {**SUBJECTS, FLOOR: reference}
    predicted = cell.get("predicted_microseconds") or {}
    subjects = {
        names.get(name, name): Measurement(
            seconds=tuple(cell["seconds"].get(name, ())),
            checked=cell["checked"].get(name, {}),
            counts={"predicted_microseconds": predicted[name]} if name in predicted else {},
            left_out=cell["left_out"].get(name),
        )
        for name in (*cell["seconds"], *cell["left_out"])
    }
    settings = {
        "kind": cell["kind"], "mode": cell["mode"], "dtype": "bf16", "out_features": cell["rows"],
        "in_features": cell["columns"], "tokens": cell["tokens"], "rank": RANK, "base": "dense",
        "layers_in_turn": cell["layers_in_turn"],
    }  # fmt: skip
    return Case(settings, reference, subjects)
