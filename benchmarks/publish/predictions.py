"""What is known of GPUs without one: predicted step times, and what the compiler made of the kernels."""

from __future__ import annotations

import math
from typing import Any

from .shown import table
from .studies import load

_LAYERS = ((4096, 4096), (14336, 4096))
_TOKENS = (512, 2048, 4096, 8192)
_CHIP = "sm_90"
_KERNELS = {
    ("effective_weight", None, "64×64"): "generating W",
    ("forward", 16, "16×64×32"): "forward, ≤ 16 tokens",
    ("forward", 64, "64×64×64"): "forward, 64 tokens",
    ("input_gradient", 64, "64×32×64"): "∂X, 64 tokens",
    ("factor_gradients", None, "64×32"): "contraction of H",
    ("token_product", None, "64×64×64"): "H and factor gradients",
}
"""(kernel, up to how many tokens, tile) → its row's name."""
_LANES = 32


def predicted_steps() -> str:
    """Device time of a step over that of its three products, and of decoding over `F.linear`."""
    found = load("step_model_h200")
    steps = {(each["rows"], each["columns"], each["tokens"]): each["ratio"] for each in found["steps"]}
    decodes = {tuple(each["sizes"]): each["unmerged"] / each["linear"] for each in found["decodes"]}
    rows = (
        [
            f"{rows} × {columns}",
            *(f"{steps[rows, columns, m]:.2f}" if (rows, columns, m) in steps else "–" for m in _TOKENS),
            f"{decodes[rows, columns, 1]:.1f}",
        ]
        for rows, columns in _LAYERS
    )
    headings = ["layer", f"{_TOKENS[0]} tokens", *map(str, _TOKENS[1:]), "decoding, × `F.linear`"]
    note = f"Predicted, not measured, for an {found['chip']['name']}: `python -m benchmarks.model.predict`"
    return f"{table(headings, rows)}\n\n{note}, triton {found['versions']['triton']}."


def compiled_kernels() -> str:
    """Instructions for each element, and cycles of issuing them against the matrix units', at r1 = r2 = 16."""
    found = load("static_report")
    wanted = {"chip": _CHIP, "family": _CHIP, "compute": "bf16", "rank": 16, "masks": "none"}
    wanted |= {"four_bit": False, "drawn": False}
    compiled = {
        (row["kernel"], row["up_to"], row["tile"], row["factors"]): row
        for row in found["rows"]
        if wanted.items() <= row.items()
    }
    rows = []
    for (kernel, up_to, tile), name in _KERNELS.items():
        both = [compiled[kernel, up_to, tile, factors] for factors in ("fp32", "bf16")]
        cycles = [row["issue_per_tensor_cycle"] for row in both]
        over = " / ".join(f"{value:.2f}" for value in cycles) if all(value is not None for value in cycles) else "–"
        rows.append(
            [name, tile, " / ".join(_per_element(row) for row in both) if kernel != "token_product" else "–", over]
        )
    headings = ("kernel", "tile (M × N × K of the product)", "instructions per element, fp32 / bf16 factors")
    about = found["versions"]
    note = f"Counts from compiled code ({_CHIP}, {about['date']}, triton {about['triton']}), not times"
    return (
        table((*headings, "issue cycles / tensor cycles"), rows, words=(0, 1))
        + f"\n\n{note}: `python -m benchmarks.compiler.static_report`."
    )


def _per_element(row: dict[str, Any]) -> str:
    """Instructions of all lanes for each element of W, or of H where the kernel contracts that."""
    found = row["issue_slots_per_element"]
    if found is None:
        elements = math.prod(int(side) for side in row["tile"].split("×"))
        found = sum(row["step"].values()) * row["warps"] * _LANES / elements
    return f"{found:.1f}"


TABLES = {"step-predicted": predicted_steps, "kernels-compiled": compiled_kernels}
