"""Writes the origins of tile shapes that a static count chose anew, from the committed static report.

``python -m benchmarks.compiler.origins`` after ``python -m benchmarks.compiler.static_report``. Shapes that a GPU
measured stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dual_lora_kernels.backends.triton.shapes import PATH, TABLE, PanelShape, ProductShape, Shapes
from dual_lora_kernels.tuning.kernel_calls import RANK
from dual_lora_kernels.tuning.tuner import write_table

from ..harness import report
from .shipped_launches import KERNELS, shipped_cases

STATIC = "static count"
"""How such an origin begins."""
_COUNTS = (
    ("issue_slots_per_element", ".1f", "lane-instructions per element of W"),
    ("issue_per_tensor_cycle", ".2f", "issue per tensor cycle"),
)
"""What the report has of some kernels: column, format, name."""


def origin(rows: Sequence[dict[str, Any]], triton: str) -> str:
    """What the report's rows say of one shape, compiled with fp32 and with bf16 factors."""
    spills = sum(row["spills"] for row in rows)
    found = [f"{spills} spills" if spills else "no spill"]
    of_default_rank = {row["factors"]: row for row in rows if row["rank"] == RANK}
    pair = [of_default_rank[factors] for factors in ("fp32", "bf16") if factors in of_default_rank]
    for column, form, name in _COUNTS:
        values = [format(row[column], form) for row in pair if row[column] is not None]
        if len(values) == 2:
            found.append(f"{' / '.join(values)} {name}")
    return f"{STATIC}, triton {triton}: {', '.join(found)}" + (" with fp32 / bf16 factors" if len(found) > 1 else "")


def renewed(document: dict[str, Any], table: dict[str, Shapes] = TABLE) -> dict[str, Shapes]:
    """`table` with the origins that the report `document` gives to its shapes."""
    rows = {(row["family"], row["name"], row["up_to"]): row for row in document["rows"]}
    triton = ".".join(document["versions"]["triton"].split(".")[:2])

    def of(family: str, kernel: str, shape: PanelShape | ProductShape) -> PanelShape | ProductShape:
        if not shape.source.startswith(STATIC):
            return shape
        cases = [
            case
            for case in shipped_cases([family], [kernel], table, masks=["none"])
            if case.shape == shape and not (case.four_bit or case.drawn)
        ]
        own = [rows[family, case.name, getattr(shape, "up_to", None)] for case in cases]
        return dataclasses.replace(shape, source=origin(own, triton))

    found = {}
    for family, shapes in table.items():
        entries: dict[str, Any] = {}
        for kernel in KERNELS:
            entry = getattr(shapes, kernel)
            each = [of(family, kernel, shape) for shape in (entry if isinstance(entry, tuple) else (entry,))]
            entries[kernel] = tuple(each) if isinstance(entry, tuple) else each[0]
        found[family] = dataclasses.replace(shapes, **entries)
    return found


def main(path: Path = PATH) -> None:
    """Rewrite the shipped table."""
    document = json.loads((report.RESULTS / "static_report.json").read_text(encoding="utf-8"))
    for family, shapes in renewed(document).items():
        write_table(path, family, shapes)


if __name__ == "__main__":
    main()
