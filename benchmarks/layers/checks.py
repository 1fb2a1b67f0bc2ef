"""Whether a subject computes what it claims, before anything is timed.

From a claim's W follow the output X Wᵀ, the input's gradient G W and, by autograd, the parameters' gradients from
H = Gᵀ X, which is the same for all methods. The error of what a subject returned, against these in fp64, is compared
with the error of the same computation in the layer's dtype. Twice as much is allowed, as in the package's tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from .claims import CLAIMS, Claim, Layer

ALLOWED = 2.0
"""Error of a subject over that of the plain computation in the same dtype; FlashAttention's criterion."""
_TOKENS = 64
"""Of the output and the input's gradient, every so many tokens are compared; the parameters' gradients need all."""
_NO_ERROR = 1 / 8
"""In units of the dtype's epsilon: rounding once, to nearest, has an error of about a fifth (root mean square)."""
_OUTPUT, _INPUT = "output", "gradient of the input"

Computed = dict[str, torch.Tensor]
"""What was computed → its values."""


class Checker:
    """Compares subjects on one layer with their claims. Subjects with the same claim share the truth."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._truths: dict[Claim, tuple[Computed, dict[str, float]]] = {}

    def give_values(self, name: str, module: nn.Module) -> list[str]:
        """Give the parameters of subject `name` the values that its claim is checked with; the claim's names for them.

        Raises:
            ValueError: it trains something that its claim does not have, or in another shape.
        """
        values = CLAIMS[name].values(self.layer)
        trained = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
        names = [own for key in trained for own in values if own in key.split(".")]
        if sorted(names) != sorted(values) or len(trained) != len(values):
            raise ValueError(f"trains {', '.join(trained) or 'nothing'}, expected {', '.join(values) or 'nothing'}")
        for own, (key, parameter) in zip(names, trained.items(), strict=True):
            if parameter.shape != values[own].shape:
                raise ValueError(f"{key}: got shape {tuple(parameter.shape)}, expected {tuple(values[own].shape)}")
            parameter.data.copy_(values[own])
        return names

    def errors(self, name: str, returned: Sequence[torch.Tensor], parameters: Sequence[str] = ()) -> dict[str, float]:
        """The error of everything that subject `name` returned, over the plain computation's.

        returned: the output and, of a step, the gradients of the input and of `parameters`, by the claim's names.
        """
        claim = CLAIMS[name]
        if claim not in self._truths:
            self._truths[claim] = self._truth(claim)
        truth, plain = self._truths[claim]
        keys = (_OUTPUT, _INPUT, *(f"gradient of {parameter}" for parameter in parameters))[: len(returned)]
        found = dict(zip(keys, returned, strict=True))
        for key in {_OUTPUT, _INPUT} & found.keys():
            found[key] = found[key][self._tokens]
        return {key: _error(value, truth[key]) / plain[key] for key, value in found.items()}

    def _truth(self, claim: Claim) -> tuple[Computed, dict[str, float]]:
        """What it computes in fp64, and the errors of the plain computation, at least those of a single rounding."""
        truth = self._computed(claim, self._exact_h, torch.float64)
        least = _NO_ERROR * torch.finfo(self.layer.weight.dtype).eps
        plain = self._computed(claim, self._plain_h, None)
        return truth, {key: max(_error(value, truth[key]), least) for key, value in plain.items()}

    def _computed(self, claim: Claim, h: torch.Tensor | None, dtype: torch.dtype | None) -> Computed:
        """With everything in `dtype`, or as it is and products in the layer's dtype."""
        layer = self.layer
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_()
            for name, value in claim.values(layer).items()
        }
        weight = claim.weight(layer.weight.to(dtype or layer.weight.dtype), leaves, layer)
        factor = weight.detach().to(dtype or layer.weight.dtype)
        found = {_OUTPUT: layer.x.detach()[self._tokens].to(factor.dtype) @ factor.t()}
        if layer.grad is not None and h is not None:
            found[_INPUT] = layer.grad[self._tokens].to(factor.dtype) @ factor
            if leaves:
                gradients = torch.autograd.grad(weight, list(leaves.values()), h.to(weight.dtype))
                found.update({f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)})
        return found

    @property
    def _tokens(self) -> slice:
        return slice(None, None, -(-self.layer.x.shape[0] // _TOKENS))

    @cached_property
    def _exact_h(self) -> torch.Tensor | None:
        grad = self.layer.grad
        return None if grad is None else grad.double().t() @ self.layer.x.detach().double()

    @cached_property
    def _plain_h(self) -> torch.Tensor | None:
        return None if self.layer.grad is None else self.layer.grad.t() @ self.layer.x.detach()


def refusal(errors: Mapping[str, float]) -> str | None:
    """Why a subject with these errors is not to be timed; None where all are allowed."""
    wrong = {key: error for key, error in errors.items() if not error <= ALLOWED}  # NaN is wrong too
    if not wrong:
        return None
    worst = max(wrong, key=lambda key: math.inf if math.isnan(wrong[key]) else wrong[key])
    return (
        f"computes something else than it claims: the error of its {worst} against fp64 is {wrong[worst]:.3g} × that "
        f"of the plain computation in the same dtype ({ALLOWED:g} is allowed)"
    )


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    scale = truth.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float((value.double() - truth).norm() / scale)
