"""`QuantisedDualLoraLinear`: a Dual LoRA adapter around a layer whose weight a library keeps quantised."""

from __future__ import annotations

import torch
from torch import nn

from .linear import DualLoraLinear
from .quantised.layers import compute_in_own_dtype, plain_layer, weight_of
from .quantised.weight import QuantisedWeight


class QuantisedDualLoraLinear(DualLoraLinear):
    """y = x round(W0 + ΔW)ᵀ + b, W0 dequantised block by block; `apply_dual_lora` makes it of a quantised layer.

    The layer itself stays inside, as it is, with its names in the state dict under ``base_layer``. It computes in the
    base layer's compute dtype where that has one, and returns the input's. W cannot be merged into a quantised weight:
    `to_linear` and `merge_dual_lora` write it into plain layers, exactly.

    Attributes:
        base_layer: the quantised layer.
        weight, bias: the base layer's.
    """

    base_layer: nn.Module

    def _adopt(self, linear: nn.Module) -> None:
        del self._parameters["weight"], self._parameters["bias"]
        self.base_layer = linear.requires_grad_(False)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The base layer's quantised parameter, in the library's form."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The base layer's bias; some libraries' is a buffer."""
        return self.base_layer.bias  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Draw the adapter anew; the quantised weight stays as it is."""
        self.reset_adapter_parameters()

    def base_device(self) -> torch.device:
        """Where the quantised weight is."""
        return self._oriented_weight().device

    def _oriented_weight(self) -> torch.Tensor | QuantisedWeight:
        return weight_of(self.base_layer)

    def _check_in_memory(self) -> None:
        self._oriented_weight()

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        self.warn_if_narrow()
        return compute_in_own_dtype(self.base_layer, input, super()._forward)

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype | None = None) -> None:
        """Keep round(W0 + ΔW) in memory, as `DualLoraLinear.prepare` does, for calls without gradients.

        The copy has the base layer's compute dtype where that has one, else `dtype`, else W0's. Calls that compute in
        another run as ever.
        """
        self._keep(self.merged_with(self._oriented_weight(), getattr(self.base_layer, "compute_dtype", None) or dtype))

    def _sources(self) -> tuple[torch.Tensor, ...]:
        weight = self._oriented_weight()
        return (*((weight,) if isinstance(weight, torch.Tensor) else weight.tensors), *self.factors(), self.scale)

    def merge(self) -> None:
        """Refused: quantising anew would round the update away, or much of it."""
        raise RuntimeError(
            "QuantisedDualLoraLinear cannot merge into its quantised weight, which would round the update: "
            "merge_dual_lora(model) or to_linear() write plain layers, prepare() keeps W for inference"
        )

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A new, plain ``nn.Linear`` with round(W0 + ΔW) in `dtype` (default: W0's, which is fp32 for int8).

        In the dtype that the layer computes in, these are bit for bit the weights that it trained with.
        """
        merged = self.merged_with(self._oriented_weight(), dtype)
        linear = plain_layer(self.base_layer, merged, as_linear=True)
        assert isinstance(linear, nn.Linear)
        return linear.train(self.training)

    @torch.no_grad()
    def to_plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """`to_linear`, but of the kind that the quantised layer was once (GPT-2's Conv1D); see `plain_layer`."""
        return plain_layer(self.base_layer, self.merged_with(self._oriented_weight(), dtype)).train(self.training)
