"""Several devices: measured memory under FSDP2, and what the cost model predicts for many GPUs."""

from __future__ import annotations

from ..harness.report import MEBIBYTE
from .shown import table
from .studies import load, origin

_LAYOUTS = {(8, "FSDP2"): "8, FSDP2", (8, "NF4 + DDP"): "8, NF4 base + DDP", (64, "FSDP2"): "64, FSDP2"} | {
    (64, "TP 8 × FSDP2"): "64, TP 8 × FSDP2"
}
"""(GPUs, layout) → its row's name, of those that the documents compare."""
_SHARDED = {(2, False): "2 processes", (2, True): "2, activation checkpointing", (4, False): "4 processes"}


def fsdp_memory() -> str:
    """The peak of a step in the process that has most."""
    found = load("fsdp_memory")
    peaks = {
        (row["layout"]["processes"], row["layout"]["checkpointing"], row["method"]): max(
            each["peak"] for each in row["memory"]
        )
        for row in found["rows"]
    }
    rows = (
        [
            name,
            *(
                f"{peaks[processes, checkpointing, method] / MEBIBYTE:.0f}"
                for method in ("lora", "lora_bf16", "dual_lora")
            ),
        ]
        for (processes, checkpointing), name in _SHARDED.items()
    )
    shown = table(("peak MiB", "PEFT LoRA", "LoRA, bf16 factors", "Dual LoRA"), rows)
    return f"{shown}\n\n{origin(found['environment'], 'python -m benchmarks.distributed.fsdp_memory')}"


def predicted() -> str:
    """A step of a 70B model: memory, communication, arithmetic. Nothing of it has run."""
    by_row = {(row["gpus"], row["layout"], row["method"]): row for row in load("cost_model")["rows"]}
    rows = []
    for (gpus, layout), name in _LAYOUTS.items():
        own, lora = by_row[gpus, layout, "Dual LoRA"], by_row[gpus, layout, "LoRA"]
        rows.append(
            [
                name,
                f"{sum(own['memory'].values()) / 1e9:.0f}",
                f"{own['communication']:.2f}",
                f"{lora['compute']:.3g}",
                f"{own['compute']:.3g}",
                f"{own['hidden_ratio']:.2f} … {own['open_ratio']:.2f}",
            ]
        )
    headings = ("GPUs, layout", "GB a GPU", "communication s", "compute s, LoRA", "Dual LoRA")
    return (
        table((*headings, "step / LoRA, communication hidden … not"), rows)
        + "\n\nPredicted, not measured: `python -m benchmarks.distributed.cost_model`."
    )


TABLES = {"fsdp-memory": fsdp_memory, "distributed-predicted": predicted}
