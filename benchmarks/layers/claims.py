"""What each method says that a linear layer's weight is, written down once more, from papers and PEFT's documentation.

All methods on a linear layer say that it has another weight, Y = X W(θ)ᵀ, so a claim is a function from the parameters
to W. It computes in the dtype of what it is given: `checks` gives it fp64 for the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from dual_lora_kernels.column_sampling import choose, draw_columns
from dual_lora_kernels.reference import delta
from dual_lora_kernels.rounding import round_to

from .methods import ALPHA, clipped_sign

SEED = 18
"""Of the parameters' values, and of the columns that sampled gradients come from."""
Values = Mapping[str, torch.Tensor]
"""A part of a parameter's dotted name → the parameter."""


@dataclass(frozen=True)
class Layer:
    """One layer and its inputs: W0 [N, K], X [M, K] and, of a step, G [M, N] in one dtype, and r1 = r2 = `rank`."""

    weight: torch.Tensor
    x: torch.Tensor
    grad: torch.Tensor | None
    rank: int


@dataclass(frozen=True)
class Claim:
    """weight: (W0, parameters, the layer) → W.

    values: of the parameters with which it is checked, in the dtype that the method trains them in.
    """

    weight: Callable[[torch.Tensor, Values, Layer], torch.Tensor]
    values: Callable[[Layer], Values]


def _factors(layer: Layer, ranks: Mapping[str, int], exponent: int) -> Values:
    """Values of −1, 0 and 1 times 2 to the power of −`exponent`; [N, rank] for names on B, D and a, else [rank, K].

    Products of such factors are exact in every dtype and order of summation, so nobody's sign of D C depends on
    rounding. Exponents are such that updates are about as large as W0.
    """
    generator = torch.Generator().manual_seed(SEED)
    rows, columns = layer.weight.shape

    def draw(name: str, rank: int) -> torch.Tensor:
        shape = (rows, rank) if name[-1] in "BDa" else (rank, columns)
        return torch.randint(-1, 2, shape, generator=generator).to(layer.weight.device, torch.float32) * 2.0**-exponent

    return {name: draw(name, rank) for name, rank in ranks.items()}


def _no_values(layer: Layer) -> Values:
    return {}


def _frozen(weight: torch.Tensor, values: Values, layer: Layer) -> torch.Tensor:
    return weight


def _full_values(layer: Layer) -> Values:
    return {"weight": layer.weight}


def _full(weight: torch.Tensor, values: Values, layer: Layer) -> torch.Tensor:
    return values["weight"]


def _lora_values(layer: Layer) -> Values:
    return _factors(layer, dict.fromkeys(("lora_A", "lora_B"), 2 * layer.rank), 4)


def _lora(weight: torch.Tensor, values: Values, layer: Layer) -> torch.Tensor:
    return weight + ALPHA / (2 * layer.rank) * (values["lora_B"] @ values["lora_A"])


def _dora_values(layer: Layer) -> Values:
    norms = layer.weight.float().norm(dim=1)
    quarters = torch.arange(3, 6, device=norms.device).repeat(-(-norms.numel() // 3))[: norms.numel()]
    return {**_lora_values(layer), "lora_magnitude_vector": norms * quarters / 4}


def _dora(weight: torch.Tensor, values: Values, layer: Layer) -> torch.Tensor:
    """Magnitude times direction; the norm counts as a constant (arXiv 2402.09353, section 4.3)."""
    direction = _lora(weight, values, layer)
    scale: torch.Tensor = values["lora_magnitude_vector"] / direction.detach().norm(dim=1)
    return scale[:, None] * direction


def _loha_values(layer: Layer) -> Values:
    return _factors(layer, dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), layer.rank), 2)


def _loha(weight: torch.Tensor, values: Values, layer: Layer) -> torch.Tensor:
    update = (values["hada_w1_a"] @ values["hada_w1_b"]) * (values["hada_w2_a"] @ values["hada_w2_b"])
    return weight + ALPHA / layer.rank * update


def _hira_values(layer: Layer) -> Values:
    return _factors(layer, dict.fromkeys(("hira_A", "hira_B"), 2 * layer.rank), 1)


def _hira(weight: torch.Tensor, values: Values, layer: Layer) -> torch.Tensor:
    return weight + weight * (values["hira_B"] @ values["hira_A"])


def _dual_lora_values(layer: Layer) -> Values:
    return _factors(layer, dict.fromkeys("ABCD", layer.rank), 4)


def _naive_values(layer: Layer) -> Values:
    return {name: value.to(layer.weight.dtype) for name, value in _dual_lora_values(layer).items()}


def _naive(weight: torch.Tensor, values: Values, layer: Layer, fraction: float = 1.0) -> torch.Tensor:
    """The paper's, not rounded. With a `fraction`, ∂P and ∂Q count as often as the sample says that `SEED` draws."""
    p, q = values["B"] @ values["A"], values["D"] @ values["C"]
    if fraction < 1:
        counts = _column_counts(layer, fraction).to(p.dtype)
        p, q = (product + (counts - 1) * (product - product.detach()) for product in (p, q))
    return weight + delta(p, q, ALPHA / layer.rank, clipped_sign)


def _dual_lora(weight: torch.Tensor, values: Values, layer: Layer, fraction: float = 1.0) -> torch.Tensor:
    """The same rounded once, with the dither, to the layer's dtype; rounding has the derivative of the identity."""
    unrounded = _naive(weight, values, layer, fraction)
    rounded = round_to(unrounded.detach(), layer.weight.dtype, "dither").to(unrounded.dtype)
    return unrounded + (rounded - unrounded.detach())


def _column_counts(layer: Layer, fraction: float) -> torch.Tensor:
    x = layer.x.detach()
    torch.manual_seed(SEED)
    sample = choose(x, draw_columns(x.shape[1], fraction, x.device))
    counts = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    return counts.index_add_(0, sample.columns, sample.weights.double())


_FULL = Claim(_full, _full_values)
_LORA = Claim(_lora, _lora_values)
_NAIVE = Claim(_naive, _naive_values)
_DUAL_LORA = Claim(_dual_lora, _dual_lora_values)
CLAIMS: dict[str, Claim] = {
    "frozen": Claim(_frozen, _no_values),
    "floor": _FULL,
    "full": _FULL,
    "lora": _LORA,
    "lora_compiled": _LORA,
    "dora": Claim(_dora, _dora_values),
    "loha": Claim(_loha, _loha_values),
    "hira": Claim(_hira, _hira_values),
    "naive": _NAIVE,
    "naive_compiled": _NAIVE,
    "dual_lora_eager": _DUAL_LORA,
    "dual_lora": _DUAL_LORA,
    "dual_lora_peft": _DUAL_LORA,
    "dual_lora_fused": _DUAL_LORA,
    "dual_lora_panels": _DUAL_LORA,
    "dual_lora_half": Claim(partial(_dual_lora, fraction=1 / 2), _dual_lora_values),
    "dual_lora_quarter": Claim(partial(_dual_lora, fraction=1 / 4), _dual_lora_values),
    "dual_lora_prepared": _DUAL_LORA,
    "dual_lora_merged": _DUAL_LORA,
}
