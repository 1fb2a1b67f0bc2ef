"""An estimate for Llama-3-70B on chips that nobody here has: a step's time over its floor, and memory.

The layers' work is `cost`'s, attention, head and memory are `distributed.cost_model`'s, rates of products and copies
`model.chips`'. How fast W is made and H contracted comes from what `model.predict` expects of the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..distributed import cost_model
from ..distributed.cost_model import Layout
from ..model.chips import CHIPS
from .compare import other_operations
from .cost import Layer, Rates, Work, memory, passes

CHIP, CAPACITY = "H200", 141e9
"""The chip, and its memory in bytes by its data sheet."""
METHODS = ("floor", "lora", "dora", "naive", "dual_lora")
MODEL = cost_model.MODELS["70B"]
_RANK = 16
_SETTINGS = cost_model.Settings(rank=2 * _RANK)
_BF16 = 2
_LAYOUTS: Mapping[str, tuple[Layout, int]] = {
    "one GPU, bf16 base": (Layout("one"), cost_model.NODE),
    "one GPU, NF4 base": (Layout("NF4", quantised=True), cost_model.NODE),
    "8 GPUs, FSDP2, bf16 base": (Layout("FSDP2", sharded=True), cost_model.NODE),
}


@dataclass(frozen=True)
class Estimate:
    """One method. seconds: a step of 8192 tokens with every block checkpointed. gigabytes: on one GPU, by layout."""

    method: str
    seconds: float
    to_floor: float
    gigabytes: Mapping[str, float]


def chip_rates(predicted: Mapping[str, Any]) -> Rates:
    """The chip's, with generation at the pace of `predicted`, the document ``step_model_h200``.

    That is the excess over the floor of its steps with the most tokens, in which products hide nothing of it.

    Raises:
        ValueError: the document is of another chip.
    """
    if predicted["chip"]["name"] != CHIP:
        raise ValueError(f"predicted: got {predicted['chip']['name']!r}, expected {CHIP!r}")
    most = max(step["tokens"] for step in predicted["steps"])
    steps = [step for step in predicted["steps"] if step["tokens"] == most]
    work = sum(
        (passes("dual_lora", Layer(most, step["rows"], step["columns"], _RANK)).step() for step in steps), start=Work()
    )
    excess = sum(step["total"] - step["floor"] for step in steps)
    chip = CHIPS[CHIP]
    return Rates(
        chip.product_operations,
        chip.bytes_per_second,
        chip.bytes_per_second,
        work.generation / excess,
        chip.launch_seconds,
    )


def layers() -> list[Layer]:
    """The seven linear layers of a block."""
    hidden, inner = MODEL.hidden, MODEL.intermediate
    heads, kept = MODEL.heads * MODEL.head_dim, MODEL.kv_heads * MODEL.head_dim
    shapes = [(heads, hidden), (kept, hidden), (kept, hidden), (hidden, heads)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [Layer(_SETTINGS.tokens, n, k, _RANK) for n, k in shapes]


def estimates(predicted: Mapping[str, Any]) -> list[Estimate]:
    """Of every method; `chip_rates`' errors."""
    rates = chip_rates(predicted)
    others = other_operations(MODEL, _SETTINGS, cost_model.CHECKPOINTED) / rates.products
    seconds = {
        name: others
        + MODEL.layers * sum(rates.seconds(passes(name, each).step(checkpointing=True), _BF16) for each in layers())
        for name in METHODS
    }
    return [
        Estimate(
            name, seconds[name], seconds[name] / seconds["floor"],
            {layout: gigabytes(name, *where) for layout, where in _LAYOUTS.items()} if name != "floor" else {},
        )
        for name in METHODS
    ]  # fmt: skip


def gigabytes(method: str, layout: Layout, gpus: int) -> float:
    """On one GPU: LoRA's or Dual LoRA's as `cost_model` has it, and what another method holds beyond LoRA.

    With checkpointing that is what one block's layers save between their forward and backward pass, and the largest
    layer's transient tensors.
    """
    if method == "dual_lora":
        return cost_model.total(MODEL, layout, gpus, "Dual LoRA", _SETTINGS) / 1e9
    own, lora = ([memory(name, each) for each in layers()] for name in (method, "lora"))
    saved = sum(each.saved for each in own) - sum(each.saved for each in lora)
    transient = max(each.transient for each in own) - max(each.transient for each in lora)
    beyond = max(0, saved + transient) * _BF16
    return (cost_model.total(MODEL, layout, gpus, "LoRA", _SETTINGS) + beyond) / 1e9
