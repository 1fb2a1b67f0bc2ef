"""Figures of a model's adapters while they train: those of an inspection, of a sample of rows, for a run's log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from . import analysis
from .adapter import FACTOR_NAMES, DualLoraAdapter, dual_lora_adapters, plain_modules
from .backends import PANEL_UNIT, Base, Block, Factors, base_of
from .peft_files import PEFT_PREFIX
from .precision import accumulation_dtype
from .quantised.weight import QuantisedWeight
from .sharding import check_gathered, full, is_sharded, reshard, whole_shape
from .validation import check_positive_int

ROWS = 256
"""Of each layer, unless a caller asks for others. Llama-3-8B's 224 layers have 0.5 G entries in as many."""
_BEFORE = "before"


def dual_lora_statistics(model: nn.Module, rows: int | None = ROWS) -> dict[str, float]:
    """Figures of the adapters of `model` that train, or of all where none does, through either door. Changes nothing.

    - ``dual_lora/frozen``: share of entries with P ≤ 0, whose update is zero and whose gradients are.
    - ``dual_lora/negative``: share of entries with Sign(DC) = −1.
    - ``dual_lora/update_norm``: ‖ΔW‖_F, the median over layers.
    - ``dual_lora/relative_norm``: ‖ΔW‖_F / ‖W0‖_F, the median over layers.
    - ``dual_lora/rounded_away``: share of the non-zero updates that rounding W0 + ΔW to nearest, in W0's dtype, loses.

    Shares are of all entries that are looked at: `rows` rows of each layer, in panels of 64 that are spread over it and
    the same in each call; None for all. Norms are estimated from these. The last two are of the layers whose W0 is at
    hand whole, and are left out where none is: of merged, offloaded and sharded weights. Factors that are sharded
    (``fully_shard``, tensor parallelism) are gathered layer by layer, so every process has to call this.

    Raises:
        ValueError: there is no adapter; a factor or W0 is not finite, or DeepSpeed's ZeRO-3 or FSDP1 keeps it in parts.
    """
    return _statistics(_adapted_layers(model), rows, {})


class DualLoraMonitor:
    """`dual_lora_statistics`, and how many signs have changed since the last call.

    ``dual_lora/sign_churn`` is the share of the entries looked at whose Sign(DC) is another than when `statistics` was
    last called, or this was made. For that C and D are kept, in a copy. Raises as `dual_lora_statistics`.
    """

    def __init__(self, model: nn.Module, rows: int | None = ROWS) -> None:
        self._model, self._rows = model, rows
        self._before = _directions(_adapted_layers(model))

    def statistics(self) -> dict[str, float]:
        """The figures by name."""
        layers = _adapted_layers(self._model)
        found = _statistics(layers, self._rows, self._before)
        self._before = _directions(layers)
        return found


class _Layer(NamedTuple):
    """An adapter, its name, and the layer that has W0: the adapter itself, or PEFT's layer around it."""

    name: str
    adapter: DualLoraAdapter
    around: nn.Module

    def factors(self) -> Factors:
        """The whole factors."""
        for name, factor in zip(FACTOR_NAMES, self.adapter.factors(), strict=True):
            check_gathered(f"{self.name}.{name}", factor, 2)
        A, B, C, D = (full(factor.detach()) for factor in self.adapter.factors())
        return Factors(A, B, C, D, self.adapter.scale.to(accumulation_dtype(self.adapter.scale.dtype)))

    def base(self) -> Base | None:
        """W0, or None where this process has not the whole of it."""
        if getattr(self.around, "merged", False) or not hasattr(self.around, "_oriented_weight"):
            return None
        weight: torch.Tensor | QuantisedWeight = self.around._oriented_weight()  # type: ignore[operator]
        if isinstance(weight, torch.Tensor):
            if weight.is_meta or is_sharded(weight) or weight.dim() != 2 or tuple(weight.shape) != whole_shape(weight):
                return None
            weight = weight.detach()
        return base_of(weight)


def _adapted_layers(model: nn.Module) -> list[_Layer]:
    """The layers whose adapters train, or all where none does."""
    around: dict[int, nn.Module] = {}
    for _, module in plain_modules(model):
        adapters = module._modules.get(PEFT_PREFIX)
        if isinstance(adapters, nn.ModuleDict):
            around |= {id(adapter): module for adapter in adapters.values()}
    layers = [_Layer(name, adapter, around.get(id(adapter), adapter)) for name, adapter in dual_lora_adapters(model)]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without Dual LoRA layers, expected an adapted model")
    reshard(model)
    return [layer for layer in layers if layer.adapter.trains()] or layers


@torch.no_grad()
def _directions(layers: list[_Layer]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of C and D."""
    return {layer.name: (factors.C.clone(), factors.D.clone()) for layer in layers for factors in [layer.factors()]}


@torch.no_grad()
def _statistics(
    layers: list[_Layer], rows: int | None, before: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """The figures, with the share of signs that are others than with the C and D of `before`."""
    if rows is not None:
        check_positive_int("rows", rows)
    every, based, norms = [], [], []
    for layer in layers:
        factors, base = layer.factors(), layer.base()
        others = {}
        if layer.name in before:
            C, D = before[layer.name]
            others[_BEFORE] = factors._replace(C=C, D=D)
        try:
            found = analysis.figures(_sample(analysis.block(factors, base), rows), others)
        except ValueError as error:
            raise ValueError(f"model: {layer.name}: {error}") from error
        every.append(found)
        norms.append(found.norm * math.sqrt(math.prod(factors.shape) / found.entries))
        if base is not None:
            based.append(found)
    entries = sum(found.entries for found in every)
    figures = {
        "frozen": 1 - sum(found.active for found in every) / entries,
        "negative": sum(found.negative for found in every) / entries,
        "update_norm": statistics.median(norms),
    }
    if based:
        changed = sum(found.changed for found in based)
        figures["relative_norm"] = statistics.median(found.relative_norm for found in based)
        figures["rounded_away"] = sum(found.rounded_away * found.changed for found in based) / max(1, changed)
    known = [found for found in every if found.overlaps]
    if known:
        equal = sum(found.overlaps[_BEFORE].equal_signs for found in known)
        figures["sign_churn"] = 1 - equal / sum(found.entries for found in known)
    return {f"dual_lora/{name}": figure for name, figure in figures.items()}


def _sample(whole: Block, rows: int | None) -> Iterator[Block]:
    """Panels of `rows` rows of a layer, 64 each, at equal distances; or all of it."""
    extent = whole.shape[0]
    if rows is None or rows >= extent:
        return analysis.row_panels(whole)
    lines = min(rows, PANEL_UNIT)
    count = rows // lines
    starts = [(extent - lines) * index // max(1, count - 1) // lines * lines for index in range(count)]
    return chain.from_iterable(analysis.row_panels(whole.rows(start, start + lines)) for start in starts)
