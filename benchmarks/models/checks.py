"""Whether every subject's model computes what its method claims, on a tiny one of the same build.

The claims are of a layer's weight (`benchmarks.layers.claims`). With the claimed weights in the place of its own, a
model without adapters in fp64 is the truth, and one in the case's dtype the plain computation. A subject may err twice
as much against the truth: in its logits, in the gradient of the embedded tokens and in those of its parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..layers.checks import Checker, refusal
from ..layers.claims import CLAIMS, Layer
from ..layers.layer_step import FLOOR
from ..layers.methods import FROZEN, MERGED, PREPARED
from .base import adapted_linears, base_model
from .case import NF4, ModelCase
from .quiet import quiet_libraries
from .shapes import TINY
from .steps import batch
from .subjects import FULL, dense, llama, subject_model

LOGITS, EMBEDDED, PARAMETERS = "logits", "gradient of the embedded tokens", "gradient of the parameters"
LIKE_NAIVE = "logits as naive Dual LoRA's"
"""Against naive Dual LoRA's in fp64, which nothing rounds to the layer's dtype, over naive Dual LoRA's error."""
_CLAIMED_AS = {FLOOR: FROZEN, "dual_lora_half": "dual_lora"}
"""Subjects that are another one but for the parameters' gradients."""
_LEAST_CHANGE = 0.1
"""Of the logits by an adapter, relative: it is given values by which updates are about as large as the weights."""
_Computed = dict[str, list[torch.Tensor]]


class ModelChecker:
    """Compares subjects of one case with their claims, on two blocks and 2 × 12 tokens.

    The floor's is the checker of the dense case.
    """

    def __init__(self, case: ModelCase) -> None:
        self.case = dataclasses.replace(case, model=case.model + TINY, layers=2, batch=2, sequence=12)
        self._dense = base_model(dense(self.case))
        self._base = base_model(self.case) if case.base == NF4 else self._dense
        self._layers = {
            name: Layer(_weight(linear), linear.weight.new_empty(0), None, case.rank)
            for name, linear in adapted_linears(self._base)
        }
        self._embedded: torch.Tensor = self._dense.get_input_embeddings()(batch(self.case))
        shape = (*self._embedded.shape[:2], self.case.shape.vocabulary)
        generator = torch.Generator().manual_seed(0)
        self._cotangent = torch.randn(shape, generator=generator).to(self._embedded)
        self._claims: dict[str, tuple[_Computed, dict[str, float]]] = {}

    def errors(self, subject: str) -> dict[str, float]:
        """What was compared → the error of `subject` over the plain computation's.

        Raises:
            ValueError: it trains something else than it should, or its logits are the frozen model's.
            ImportError: the method's library is not installed.
        """
        claim = _CLAIMED_AS.get(subject, subject)
        parameters: list[torch.Tensor] = []

        def give_values(model: nn.Module) -> None:
            for name, layer in self._layers.items():
                module = llama(model).get_submodule(name)
                names = Checker(layer).give_values(claim, module)
                own = dict(zip(names, (p for p in module.parameters() if p.requires_grad), strict=True))
                parameters.extend(own[each] for each in CLAIMS[claim].values(layer))

        with quiet_libraries():
            model = subject_model(self._base, subject, self.case, give_values)
            serves = subject in (PREPARED, MERGED)
            found = self._computed(model, [] if subject == "dual_lora_half" else parameters, gradients=not serves)
        if claim not in (FROZEN, FULL):
            change = _error(found[LOGITS], self._claim(FROZEN)[0][LOGITS])
            if not change > _LEAST_CHANGE:
                raise ValueError(f"subject: the adapter of {subject!r} changes the logits by {change:.3g} only")
        errors = self._over_plain(found, claim)
        if claim.startswith("dual_lora"):
            errors[LIKE_NAIVE] = self._over_plain({LOGITS: found[LOGITS]}, "naive")[LOGITS]
        return errors

    def _over_plain(self, found: _Computed, claim: str) -> dict[str, float]:
        truth, plain = self._claim(claim)
        return {key: round(_error(values, truth[key]) / plain[key], 4) for key, values in found.items()}

    def _claim(self, claim: str) -> tuple[_Computed, dict[str, float]]:
        """The truth, and the plain computation's errors."""
        if claim not in self._claims:
            truth, plain = self._by_claim(claim, torch.float64), self._by_claim(claim, self.case.torch_dtype)
            self._claims[claim] = truth, {key: _error(values, truth[key]) for key, values in plain.items()}
        return self._claims[claim]

    def _by_claim(self, claim: str, dtype: torch.dtype) -> _Computed:
        """Of the model without adapters in `dtype` whose layers have the claimed weights."""
        exact = dtype == torch.float64
        model = _in_fp64(self._dense) if exact else self._dense
        weights: dict[str, torch.Tensor] = {}
        leaves: list[torch.Tensor] = []
        for name, layer in self._layers.items():
            values = {
                key: value.detach().to(dtype if exact else value.dtype).requires_grad_()
                for key, value in CLAIMS[claim].values(layer).items()
            }
            weights[f"{name}.weight"] = CLAIMS[claim].weight(layer.weight.to(dtype), values, layer).to(dtype)
            leaves += values.values()
        return self._computed(lambda **inputs: functional_call(model, weights, kwargs=inputs), leaves, dtype)

    def _computed(
        self,
        model: Callable[..., Any],
        parameters: Sequence[torch.Tensor],
        dtype: torch.dtype | None = None,
        gradients: bool = True,
    ) -> _Computed:
        embedded = self._embedded.to(dtype or self._embedded.dtype, copy=True).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            logits = model(inputs_embeds=embedded).logits
        if not gradients:
            return {LOGITS: [logits]}
        own, *others = torch.autograd.grad(logits, [embedded, *parameters], self._cotangent.to(logits.dtype))
        found = {LOGITS: [logits.detach()], EMBEDDED: [own]}
        return {**found, PARAMETERS: others} if others else found


def checked(case: ModelCase, subjects: Sequence[str]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """For each subject its errors over the plain computation's, and why some are not to be timed."""
    own = ModelChecker(case)
    of_dense = own if case == dense(case) else ModelChecker(dense(case))
    found, refused = {}, {}
    for subject in subjects:
        try:
            found[subject] = (of_dense if subject == FLOOR else own).errors(subject)
        except Exception as error:  # a library or a compiler that is missing, say: the others are still to be measured
            refused[subject] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            if reason := refusal(found[subject]):
                refused[subject] = reason
    torch.compiler.reset()  # or what compiles next, in other shapes, would compile for any shape
    return found, refused


def _weight(linear: nn.Linear) -> torch.Tensor:
    """W0 as numbers."""
    if type(linear).__name__ != "Linear4bit":
        return linear.weight.detach()
    from ..quantised.bases import dequantised

    return dequantised(linear)


def _in_fp64(model: nn.Module) -> nn.Module:
    """A copy that computes in fp64 throughout; transformers' norms would round to fp32."""
    exact = copy.deepcopy(model).double()
    for name, module in list(exact.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, last = name.rpartition(".")
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            norm = nn.RMSNorm(weight.numel(), eps=module.variance_epsilon, dtype=torch.float64)  # type: ignore[arg-type]
            norm.weight.data.copy_(weight)
            setattr(exact.get_submodule(parent), last, norm.to(weight.device))
    return exact.requires_grad_(False)


def _error(values: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Relative, over all numbers of all tensors."""
    pairs = [(value.double(), exact.double()) for value, exact in zip(values, truth, strict=True)]
    wrong = sum(float((value - exact).square().sum()) for value, exact in pairs)
    return math.sqrt(wrong / sum(float(exact.square().sum()) for _, exact in pairs))
