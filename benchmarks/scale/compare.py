"""The cost model's predictions beside what the suite has measured on the same machine, as multiples of the floor."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..distributed import cost_model
from ..harness.results import Case
from .cost import PREDICTED, Layer, Rates, step_seconds

_ITEMSIZE = 4
"""The model knows of no casts: fp32 alone is predicted on CPUs."""
_PRODUCTS_OF_DUAL_LORA = 2
"""Large products of a step beside those of its forward passes."""


@dataclass(frozen=True)
class Comparison:
    """One subject in one case: its time over the floor's as `measured`, and as `predicted`."""

    case: Case
    subject: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def comparable(case: Case) -> bool:
    """Whether the model says something of a case: a step in fp32 on a dense base, with nothing beside it."""
    at = case.settings
    plain = at.get("base", "dense") == "dense" and not at.get("checkpointing") and "busy_processes" not in at
    return at["kind"] in ("step", "train") and at.get("dtype") == "fp32" and plain and "floor" in case.timed()


def comparisons(cases: Iterable[Case], rates: Rates) -> Iterator[Comparison]:
    """Every subject of comparable cases that the model covers, but for the floor itself."""
    for case in filter(comparable, cases):
        floor = predicted_seconds(case, "floor", rates)
        for subject in case.timed():
            if subject in PREDICTED and subject != "floor":
                measured = case.ratio(subject, "floor").median
                yield Comparison(case, subject, measured, predicted_seconds(case, subject, rates) / floor)


def predicted_seconds(case: Case, subject: str, rates: Rates) -> float:
    """Of a layer's, a stack's or a model's step; of a model without norms, activations, loss and optimiser."""
    at = case.settings
    if at["kind"] == "step":
        layer = Layer(int(at["tokens"]), int(at["out_features"]), int(at["in_features"]), int(at["rank"]))
        return int(at.get("layers", 1)) * step_seconds(subject, layer, rates, _ITEMSIZE)
    from ..models.shapes import shape  # transformers takes seconds to import

    found = shape(str(at["model"]), int(at["layers"]))
    model = cost_model.Model(
        found.hidden, found.layers, found.intermediate, found.heads, found.key_value_heads,
        found.hidden // found.heads, found.vocabulary, found.tied,
    )  # fmt: skip
    tokens, rank = int(at["batch"]) * int(at["sequence"]), int(at["rank"])
    settings = cost_model.Settings(tokens=tokens, sequence=int(at["sequence"]), rank=2 * rank)
    linear = sum(step_seconds(subject, Layer(tokens, n, k, rank), rates, _ITEMSIZE) for n, k in found.linears)
    return linear + other_operations(model, settings, forwards=1) / rates.products


def other_operations(model: cost_model.Model, settings: cost_model.Settings, forwards: int) -> float:
    """Operations of attention and the output head: those of `cost_model` without Dual LoRA's large products."""
    products, _ = cost_model.operations(model, 1, "Dual LoRA", settings, forwards)
    return products - 2 * settings.tokens * model.layers * model.weights * (forwards + _PRODUCTS_OF_DUAL_LORA)


def typical_error(found: Iterable[Comparison]) -> float:
    """The median factor by which predictions are off, to either side.

    Raises:
        ValueError: there are none.
    """
    factors = [max(each.error, 1 / each.error) for each in found]
    if not factors:
        raise ValueError("comparisons: got none, expected one or more")
    return statistics.median(factors)
