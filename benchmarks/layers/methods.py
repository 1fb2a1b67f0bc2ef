"""Every method on one frozen linear layer, at equal trainable parameters (DoRA adds its magnitude vector).

The bounds on both sides are among them: ``frozen`` trains nothing, and ``full`` trains the weight. Ranks follow from
Dual LoRA's r1 and r2, whose four factors hold (r1 + r2)·(N + K) numbers: LoRA, DoRA and HiRA take r = r1 + r2, LoHa,
which has four factors itself, half of that. PEFT's adapters keep PEFT's own defaults (fp32 also on a bf16 base,
zero-initialised updates): how long a step takes does not depend on the values. PEFT is imported when one of its methods
is built, so the others run where it is not installed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from dual_lora_kernels import DualLoraLinear, dual_lora_linear
from dual_lora_kernels.reference import SignStraightThrough, delta

ALPHA = 32.0
"""Numerator of the update's scale, for all methods that have one."""
FROZEN, PREPARED, MERGED = "frozen", "dual_lora_prepared", "dual_lora_merged"
"""Subjects that are one of ``METHODS`` or made of one, by name: no adapter, W kept in memory, merged."""
INIT_STD = 0.02
"""Standard deviation of naive Dual LoRA's factors, as `DualLoraLinear`'s default."""


def frozen_linear(
    in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Linear:
    """A frozen linear layer without bias, W0 ~ N(0, 0.02²): what every method adapts."""
    linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    return linear.requires_grad_(False)


def share(linear: nn.Linear) -> nn.Linear:
    """Another module on the same weight: W0 is in memory once, however many methods adapt it."""
    twin = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
    twin.weight = linear.weight
    return twin


def clipped_sign(q: torch.Tensor) -> torch.Tensor:
    """Sign(Q), whose gradient is the paper's: clipped to ±1."""
    found: torch.Tensor = SignStraightThrough.apply(q, "clip", 1.0)
    return found


class NaiveDualLora(nn.Module):
    """Dual LoRA as it is written down: every N×K intermediate whole, in the layer's dtype, kept for backward.

    No autocast, no dither and no fp32 accumulation, as in the implementations that adopters use.
    """

    def __init__(self, linear: nn.Linear, r1: int, r2: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scale = ALPHA / math.sqrt(r1 * r2)
        rows, columns = linear.weight.shape

        def factor(*shape: int) -> nn.Parameter:
            return nn.Parameter(linear.weight.new_empty(shape).normal_(0.0, INIT_STD))

        self.A, self.B = factor(r1, columns), factor(rows, r1)
        self.C, self.D = factor(r2, columns), factor(rows, r2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        return nn.functional.linear(input, self.weight + self.update())

    def update(self) -> torch.Tensor:
        """ΔW [N, K], with the paper's straight-through estimator."""
        return delta(self.B @ self.A, self.D @ self.C, self.scale, clipped_sign)


Builder = Callable[[nn.Linear, int, int], nn.Module]
"""(frozen layer, r1, r2) → the layer adapted, in training mode. The frozen layer's weight is shared, not copied."""


class EagerDualLora(DualLoraLinear):
    """`DualLoraLinear` on the eager backend, whatever else there is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        factors = (self.A, self.B, self.C, self.D)
        return dual_lora_linear(input, self.weight, *factors, self.scale, self.bias, backend="eager")


class _Model(nn.Module):
    """The smallest model that PEFT adapts: it looks for layers by name inside a model."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer = linear
        self.is_loaded_in_4bit = type(linear).__name__ == "Linear4bit"  # as transformers tells PEFT

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(input)
        return output


PEFT_METHODS: dict[str, tuple[str, Callable[[int, int], dict[str, object]]]] = {
    "lora": ("LoraConfig", lambda r1, r2: {"r": r1 + r2, "lora_alpha": int(ALPHA)}),
    "dora": ("LoraConfig", lambda r1, r2: {"r": r1 + r2, "lora_alpha": int(ALPHA), "use_dora": True}),
    "loha": ("LoHaConfig", lambda r1, r2: {"r": (r1 + r2) // 2, "alpha": int(ALPHA)}),
    "hira": ("HiraConfig", lambda r1, r2: {"r": r1 + r2}),
}
"""PEFT's own methods → its configuration class, and what that is given."""


def with_peft(model: nn.Module, name: str, r1: int, r2: int, target_modules: str | list[str]) -> nn.Module:
    """`model` adapted through PEFT, by one of ``PEFT_METHODS`` or ``dual_lora_peft``.

    Raises:
        ImportError: PEFT, or that class of it, is missing.
    """
    import peft

    if name == "dual_lora_peft":
        from dual_lora_kernels.peft import DualLoraConfig

        config = DualLoraConfig(target_modules=target_modules, r1=r1, r2=r2, alpha=ALPHA)
    else:
        kind, options = PEFT_METHODS[name]
        if not hasattr(peft, kind):
            raise ImportError(f"peft {peft.__version__} has no {kind}")
        config = getattr(peft, kind)(target_modules=target_modules, **options(r1, r2))
    logger = logging.getLogger("dual_lora_kernels")
    was, logger.disabled = logger.disabled, True  # it warns of no warm-up, and nothing is to be trained here
    try:
        adapted: nn.Module = peft.get_peft_model(model, config)
    finally:
        logger.disabled = was
    return adapted


def _peft(name: str) -> Builder:
    return lambda linear, r1, r2: with_peft(_Model(linear), name, r1, r2, ["layer"])


def _dual_lora(linear: nn.Linear, r1: int, r2: int, fraction: float = 1.0) -> nn.Module:
    return DualLoraLinear.from_linear(linear, r1=r1, r2=r2, alpha=ALPHA, gradient_columns=fraction)


def _frozen(linear: nn.Linear, r1: int, r2: int) -> nn.Module:
    return linear


def _full(linear: nn.Linear, r1: int, r2: int) -> nn.Module:
    """On the same memory, which nothing here changes; the parameter is another, since only this one trains."""
    linear.weight = nn.Parameter(linear.weight.detach())
    return linear


def compiled(module: nn.Module) -> nn.Module:
    """Compiles at its first call; ``torch.compiler.reset()`` before many, of which PyTorch compiles eight.

    A ninth is an error from here on: PyTorch would run it as it is, and its time would stand for a compiled one's.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    module.compile(dynamic=False)
    return module


METHODS: dict[str, Builder] = {
    FROZEN: _frozen,
    "full": _full,
    "lora": _peft("lora"),
    "lora_compiled": lambda linear, r1, r2: compiled(_peft("lora")(linear, r1, r2)),
    "dora": _peft("dora"),
    "loha": _peft("loha"),
    "hira": _peft("hira"),
    "naive": NaiveDualLora,
    "naive_compiled": lambda linear, r1, r2: compiled(NaiveDualLora(linear, r1, r2)),
    "dual_lora_eager": lambda linear, r1, r2: EagerDualLora.from_linear(linear, r1=r1, r2=r2, alpha=ALPHA),
    "dual_lora": _dual_lora,
    "dual_lora_peft": _peft("dual_lora_peft"),
    "dual_lora_half": lambda linear, r1, r2: _dual_lora(linear, r1, r2, 1 / 2),
    "dual_lora_quarter": lambda linear, r1, r2: _dual_lora(linear, r1, r2, 1 / 4),
}
LABELS = {
    FROZEN: "frozen base, no adapter",
    "floor": "three products",
    "full": "full fine-tuning",
    "lora": "PEFT LoRA",
    "lora_compiled": "PEFT LoRA, torch.compile",
    "dora": "PEFT DoRA",
    "loha": "PEFT LoHa",
    "hira": "PEFT HiRA",
    "naive": "naive Dual LoRA",
    "naive_compiled": "naive Dual LoRA, torch.compile",
    "dual_lora_eager": "dual_lora_kernels, eager",
    "dual_lora": "dual_lora_kernels",
    "dual_lora_peft": "dual_lora_kernels in PEFT",
    "dual_lora_fused": "dual_lora_kernels, fused",
    "dual_lora_panels": "dual_lora_kernels, panels",
    "dual_lora_half": "dual_lora_kernels, 1/2 of the columns",
    "dual_lora_quarter": "dual_lora_kernels, 1/4 of the columns",
    PREPARED: "dual_lora_kernels, prepared",
    MERGED: "dual_lora_kernels, merged",
    "copy": "copy of the weight",
    "new_copy": "copy into new memory",
    "cp": "cp",
    "cp_and_sync": "cp, then sync",
    "product": "products",
    "generate": "W from its factors",
    "launch": "a launch",
}
"""What subjects are called in tables, in the tables' order; also those that are no method of a training step."""


def build(name: str, linear: nn.Linear, r1: int = 16, r2: int = 16) -> nn.Module:
    """`linear` adapted by the method `name` of `METHODS`, sharing its weight. LoHa needs r1 + r2 to be even."""
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name](share(linear), r1, r2).train()


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
