"""How fast a device multiplies in a dtype, beside fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..harness.environment import DTYPE_NAMES
from ..harness.timing import interleaved, ratios

_TOKENS, _FEATURES = 64, 512
_ROUNDS = 5
_SLOW = 3.0
"""Times fp32's: processors with units for a dtype take less than fp32's time, those without from 10 to 200 times."""


def slow_products(dtype: str, device: torch.device) -> str | None:
    """How much slower products in `dtype` are than in fp32 on a CPU, as a clause; None where they are not."""
    if device.type != "cpu":
        return None
    x, weight = torch.randn(_TOKENS, _FEATURES), torch.randn(_FEATURES, _FEATURES)

    def product(name: str) -> Callable[[], torch.Tensor]:
        operands = x.to(DTYPE_NAMES[name]), weight.to(DTYPE_NAMES[name])
        return lambda: torch.mm(*operands)

    products = {name: product(name) for name in ("fp32", dtype)}
    seconds = interleaved(products, rounds=_ROUNDS, warmup=1, device=device, show=False)
    times = ratios(seconds, dtype, "fp32").median
    if times <= _SLOW:
        return None
    return f"this processor has no units for {dtype}, in which PyTorch's products take {times:.0f} × as long as in fp32"
