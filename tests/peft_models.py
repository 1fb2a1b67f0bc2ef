"""Small models that PEFT adapts by Dual LoRA, for the tests of its verbs."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dual_lora_kernels.peft import DualLoraConfig, Linear

from .models import llama

SMALL: dict[str, Any] = {"r1": 3, "r2": 2, "alpha": 1.0, "init_std": 0.3}


def config(target_modules: Any = "all-linear", **options: Any) -> DualLoraConfig:
    return DualLoraConfig(**{"target_modules": target_modules, "task_type": "CAUSAL_LM"} | SMALL | options)


def adapted(seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(llama(dtype=dtype), config(**options)).eval()


def layers(model: nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model).items()}


class Net(nn.Module):
    """Two linear layers and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 7)
        self.convolution = nn.Conv1d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.convolution(torch.tanh(self.first(x))[:, None])[:, 0])


def net(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net(), DualLoraConfig(**{"target_modules": ["first", "second"]} | SMALL | options)).eval()


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
