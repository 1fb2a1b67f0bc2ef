"""Save, reload, merge: shows that the adapter that was trained is the one that is deployed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dual_lora_kernels import DualLoraLinear, load_dual_lora, merge_dual_lora, save_dual_lora

NOISE_MULTIPLE = 4.0
"""Two evaluations that each err by the measured noise differ by at most twice as much; the rest is head room."""


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences between logits. ``rounding_noise`` is how far the merged model's logits are from
    those of the same weights in fp64: what the working precision alone costs. All are NaN where training diverged."""

    reloaded_difference: float
    merged_difference: float
    rounding_noise: float
    largest_logit: float
    layers_adapted: int
    layers_left: int

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words; empty when all three models agree."""
        if math.isnan(self.largest_logit):
            return ["the trained logits are not finite: Dual LoRA diverged, nothing was saved; lower its rate"]
        found = []
        if self.reloaded_difference != 0.0:
            found.append(
                "the reloaded adapter's logits differ from the trained ones by "
                f"{self.reloaded_difference:.3g}, not by 0"
            )
        if self.merged_difference > NOISE_MULTIPLE * self.rounding_noise:
            found.append(
                f"the merged model's logits differ from the trained ones by {self.merged_difference:.3g}, more than "
                f"{NOISE_MULTIPLE:g} times the rounding noise of {self.rounding_noise:.3g}"
            )
        if self.layers_adapted == 0:
            found.append("the trained model has no DualLoraLinear")
        if self.layers_left:
            found.append(f"{self.layers_left} DualLoraLinear layers remain after merging")
        return found


def verify(
    trained: nn.Module, fresh_base: Callable[[], PreTrainedModel], adapter_folder: Path, tokens: Tensor
) -> Verification:
    """Saves the trained adapter, reloads it into a fresh base, merges that, and compares the logits of all three.

    ``tokens`` [batch, length] are what the logits are computed on.
    """
    device = next(trained.parameters()).device
    tokens = tokens.to(device)
    trained_logits = _logits(trained, tokens)
    if not trained_logits.isfinite().all():
        return Verification(math.nan, math.nan, math.nan, math.nan, _dual_lora_layers(trained), 0)
    save_dual_lora(trained, adapter_folder)
    model = load_dual_lora(fresh_base(), adapter_folder).to(device)
    reloaded_logits = _logits(model, tokens)
    merged = merge_dual_lora(model)
    merged_logits = _logits(merged, tokens)
    layers_left = _dual_lora_layers(merged)
    # On the CPU because not every accelerator has fp64.
    exact_logits = _logits(merged.to("cpu", torch.float64), tokens.cpu())
    return Verification(
        reloaded_difference=_largest_difference(reloaded_logits, trained_logits),
        merged_difference=_largest_difference(merged_logits, trained_logits),
        rounding_noise=_largest_difference(merged_logits, exact_logits),
        largest_logit=trained_logits.abs().max().item(),
        layers_adapted=_dual_lora_layers(trained),
        layers_left=layers_left,
    )


def _dual_lora_layers(model: nn.Module) -> int:
    return sum(isinstance(module, DualLoraLinear) for module in model.modules())


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits
    return logits.to("cpu", torch.float64)


def _largest_difference(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()
